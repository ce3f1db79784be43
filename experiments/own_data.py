"""Pictures of one's own: emoji from their names, and what a few steps make of photographs.

    python -m experiments.own_data emoji --clip words --steps 1200    # 15 min on one busy core
    python -m experiments.own_data photographs --data path/to/coco --clip words  # 150 steps
    python -m experiments.own_data words --preset deep    # the toy world without its CLIP

emoji downloads 23 MB from the npm registry: Microsoft's Fluent Emoji as @lobehub/fluent-emoji-3d
ships them, and their English names from emojibase-data (both under the MIT licence). It writes
data/emoji/, a .webp and a .txt for each of some 1 600 emoji, trains on them as
`uvit_fusion.py --train --data data/emoji` does, and draws names, some of them not trained on.

photographs counts the black ones among 24 images of validation captions, for each sampler. With the
toy world's --time-power 0.3 many are black or white: see PRESETS in uvit_fusion.py.

words trains the base model on the toy world with `--clip words` and grades it.

Each writes results.json into its run folder.
"""
import argparse
import io
import json
import tarfile
import time
import urllib.request
from pathlib import Path

import common
import image_data
import toy
import uvit_fusion
from common import UserError
from toy import judge
from toy.validation import validation_captions
from uvit_fusion import PRESETS, Config

REGISTRY = "https://registry.npmjs.org"
PICTURES = "@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
NAMES = "emojibase-data/-/emojibase-data-17.0.0.tgz"
PROMPTS = (
    # trained on, if they fell into that split
    "red heart", "blue circle", "green apple", "yellow square", "evergreen tree", "full moon",
    "cat face", "soccer ball",
    # not among the names, except for the brown circle
    "green heart with arrow", "purple apple", "blue moon", "red tree", "orange book and pen",
    "brown circle", "green car", "blue cat",
)


# -------------------------------------------------------------------------------------------- emoji
def download(url):
    """The files of a .tgz on the web, {name within the package: bytes}."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise UserError(f"{url} cannot be downloaded ({error})") from None
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        return {member.name.removeprefix("package/"): package.extractfile(member).read()
                for member in package if member.isfile()}


def prepare_emoji(folder, registry=REGISTRY):
    """Writes an image and its name for each emoji that has both, if they are not there."""
    folder = Path(folder)
    if (folder / ".done").exists():                  # hidden, so it is not part of the data set
        return folder
    pictures = download(f"{registry}/{PICTURES}")
    names = json.loads(download(f"{registry}/{NAMES}")["en/data.json"])
    folder.mkdir(parents=True, exist_ok=True)
    for emoji in names:
        code = emoji["hexcode"].lower()
        picture = pictures.get(f"assets/{code}.webp")
        if picture:
            (folder / f"{code}.webp").write_bytes(picture)
            (folder / f"{code}.txt").write_text(emoji["label"] + "\n", encoding="utf-8")
    (folder / ".done").touch()
    return folder


def emoji(args, device, precision):
    """Trains on emoji, draws PROMPTS, and writes how many steps and seconds it took."""
    args.data = str(prepare_emoji("data/emoji"))
    begin = time.time()
    pipeline, folder = train(args, "runs/emoji", device, precision)
    path = folder / "samples" / "emoji.png"
    common.image_grid(pipeline.generate(PROMPTS), PROMPTS, path, columns=8)
    print(f"names and made-up names, drawn: {path}")
    common.write_results(folder, {
        "emoji_steps": pipeline.cfg.steps, "emoji_seconds": time.time() - begin})


# -------------------------------------------------------------------------------------- photographs
def photographs(args, device, precision):
    """Counts images with a mean brightness below 32 of 255, among those of 24 captions."""
    if getattr(args, "data", "shapes") == "shapes":
        raise UserError("name a folder of photographs: --data path/to/coco")
    args.steps = getattr(args, "steps", 150)
    pipeline, folder = train(args, "runs/photographs", device, precision)
    dataset = image_data.CaptionedImages(pipeline.cfg.data, "val", pipeline.image_size)
    captions = validation_captions(dataset, 24)
    rows = [["sampler", "black images", "mean brightness"]]
    figures = {}
    for sampler in ("dpm", "ddim", "ddpm"):
        brightness = pipeline.generate(captions, sampler=sampler).mean((1, 2, 3))
        black = int((brightness < 32).sum())
        rows.append([sampler, black, float(brightness.mean())])
        figures[f"black_pictures_{sampler}"] = black
    figures["black_pictures"] = figures[f"black_pictures_{pipeline.cfg.sampler}"]
    common.print_table(rows, f"{len(captions)} captions after {pipeline.cfg.steps} steps")
    common.write_results(folder, figures)


# ------------------------------------------------------------------------------------------- words
def words(args, device, precision):
    """Grades the base model of the toy world with word embeddings learned along with it."""
    args.clip = "words"
    pipeline, folder = train(args, "runs/words", device, precision)
    figures, table = judge.accuracy(pipeline, toy.prepare("shapes", "words"))
    judge.print_accuracy(figures, table, f"{folder}: word embeddings in place of the tiny CLIP")
    common.write_results(folder, {
        "emoji_clip_free_all": figures["all"], "emoji_clip_free_all_ci": figures["all_ci"]})


def train(args, folder, device, precision):
    """Trains as `uvit_fusion.py --train` does; returns the pipeline and the run folder."""
    cfg = common.make_config(Config, PRESETS, args)
    data = toy.prepare(cfg.data, cfg.clip, cfg.size)
    folder = Path(args.out or folder)
    common.check_run(folder, args)
    if cfg.clip == "words":
        cfg.clip = toy.models.train_words(data, cfg.size, folder, args.resume)
    return uvit_fusion.train(cfg, data, folder, args, device, precision), folder


EXPERIMENTS = {"emoji": emoji, "photographs": photographs, "words": words}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what to do")
    common.add_training_flags(parser, "run folder (default runs/<experiment>)")
    common.add_config_flags(parser, Config, PRESETS)
    parser.set_defaults(workers=None, compile=None, validation_samples=0)        # for `train`
    args = parser.parse_args()
    device = common.pick_device(args.device)
    EXPERIMENTS[args.experiment](args, device, common.pick_precision(args.precision, device))


if __name__ == "__main__":
    common.entry(main)
