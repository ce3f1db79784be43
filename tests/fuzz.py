"""Damaged files and odd command lines, each of which must end well or in a one-line error.

    python tests/fuzz.py                       # run by hand: half a minute each, then a table
    python tests/fuzz.py --seconds 600 --seed 1

A file is damaged in its bytes or, if it is JSON, a table or tensors, in its shape: a key is
missing, a value is huge or of another type. The exit status is 1 if anything ended in a traceback.
"""
import argparse
import collections
import contextlib
import copy
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import TINY, make_clip, make_coco, refused, run, save_run, tiny_cfg, tiny_pipeline
from PIL import Image

import autoencoder
import common
import encoders
import eval as grading
import fine_rewards
import image_data
import llm_adapter
import sample
import sur_adapter
from experiments import dsd as rivals
from toy import matching
from toy.models import train_tokenizer

ODD = [None, True, "", "x", "\ud800", "../..", -1, 0, 0.5, 3, 1e300, 10**40, float("nan"), [], {},
       [None], [[1]], ["a", 3], {"a": 1}]


# --------------------------------------------------------------------------------- damaged files
def damage_bytes(content, rng):
    """Bytes, some of them changed, missing, doubled or new."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        first = rng.randrange(len(content) + 1)
        last = min(len(content), first + rng.choice((1, 2, 16, 200)))
        part = content[first:last]
        content[first:last] = rng.choice((
            b"", part * 2, rng.randbytes(len(part)), bytes(len(part)),
            bytes(byte ^ 1 << rng.randrange(8) for byte in part)))
    return bytes(content[:rng.randrange(len(content) + 1)] if rng.random() < 0.2 else content)


def damage_value(value, rng):
    """JSON, or a state of tensors, with one part missing, changed or replaced."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.5:
        return rng.choice((value[None], value.flatten()[:-1], value.double(), value * torch.nan))
    if isinstance(value, (dict, list, tuple)) and len(value) and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        value = copy.copy(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = damage_value(value[key], rng)
        return value
    return copy.deepcopy(rng.choice(ODD))


def damage_file(path, rng):
    """Damages a file in place."""
    content = path.read_bytes()
    if rng.random() < 0.4:
        path.write_bytes(damage_bytes(content, rng))
    elif path.suffix == ".json":
        path.write_text(json.dumps(damage_value(json.loads(content), rng)))
    elif path.suffix in (".jsonl", ".csv"):
        lines = content.decode().splitlines()
        i = rng.randrange(len(lines))
        if path.suffix == ".jsonl":
            lines[i] = json.dumps(damage_value(json.loads(lines[i]), rng))
        else:
            cells = lines[i].split(",")
            cells[rng.randrange(len(cells))] = str(rng.choice(ODD))
            lines[i] = ",".join(cells[:rng.choice((1, 9, 9))])
        path.write_text("\n".join(lines), errors="surrogatepass")
    elif path.suffix in (".pt", ".pth") and "script" not in path.name:
        torch.save(damage_value(torch.load(path), rng), path)
    elif path.suffix == ".safetensors":
        tensors = damage_value(common.load_file(path), rng)
        tensors = tensors if isinstance(tensors, dict) else {}
        common.save_tensors({name: tensor for name, tensor in tensors.items()
                             if isinstance(tensor, torch.Tensor)}, path)
    elif path.suffix == ".npz":
        arrays = damage_value(dict(np.load(path)), rng)
        np.savez(path, **(arrays if isinstance(arrays, dict) else {}))
    else:
        path.write_bytes(damage_bytes(content, rng))


class MeanColour(torch.nn.Module):
    """Stands in for Inception."""
    def forward(self, x):
        return x.float().mean((2, 3))


class Files:
    """Intact files in a folder, {kind: (path, function that reads it)}."""
    def __init__(self, folder, clip):
        self.folder = folder
        self.clip = clip
        self.pipeline = tiny_pipeline(clip)
        self.kinds = {}
        self.data_sets()
        self.images()
        self.models()
        self.run_folder()
        self.text_models()
        self.methods()

    def add(self, kind, path, read):
        self.kinds[kind] = (Path(path), read)

    def use(self, root, split="train"):
        dataset = image_data.CaptionedImages(root, split, 8)
        for i in range(min(3, len(dataset))):
            _, caption, _ = dataset[i, i]
            self.pipeline.text_encoder([caption])

    def data_sets(self):
        coco = make_coco(self.folder / "coco")
        self.add("captions_train2017.json", coco / "annotations" / "captions_train2017.json",
                 lambda: self.use(coco))
        texts = self.folder / "texts"
        texts.mkdir()
        lists = self.folder / "lists"
        lists.mkdir()
        lines = []
        for i in range(6):
            for root in (texts, lists):
                Image.new("RGB", (9, 8), (i, 0, 0)).save(root / f"{i}.png")
            (texts / f"{i}.txt").write_text("a caf\u00e9\nin words\n")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": "a caption", "prompt": "a",
                                     "stars": 3}))
        (lists / "metadata.jsonl").write_text("\n".join(lines))
        self.add("captions .txt", texts / "3.txt", lambda: self.use(texts))
        self.add("metadata.jsonl", lists / "metadata.jsonl", lambda: self.use(lists))
        self.add("prompts", texts / "2.txt", lambda: self.pipeline.text_encoder(
            sample.read_prompts(argparse.Namespace(prompts=["a"], file=texts / "2.txt"))))

    def images(self):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 4), np.uint8))
        exif = Image.Exif()
        exif.update({0x0112: 6, 0x010F: "camera", 0x9286: b"comment", 0x829A: 0.01})
        modes = {"a.jpg": "RGB", "b.jpg": "CMYK", "a.png": "RGBA", "b.png": "P", "c.png": "I;16",
                 "a.gif": "P", "a.webp": "RGBA", "a.bmp": "RGB", "a.tif": "RGB", "b.tif": "LA"}
        for name, mode in modes.items():
            path = self.folder / name
            image = noise.convert("L").convert(mode) if mode == "I;16" else noise.convert(mode)
            image.save(path, **({} if mode == "I;16" else {"exif": exif}))
            self.add(name, path, lambda path=path: image_data.load_image(path, 16))

    def models(self):
        vae = autoencoder.Autoencoder((32, 32), blocks=1).eval()
        path = self.folder / "vae.safetensors"
        common.save_tensors(vae.state_dict(), path)
        self.add("autoencoder", path, lambda: autoencoder.load(path))
        coco, cache = self.folder / "coco", self.folder / "latents"

        def latents():
            autoencoder.Latents(coco, "train", 8, vae, cache)[0, 0]
        latents()
        for name in ("latents.json", "latents.npy"):
            self.add(name, cache / "coco-train-8" / name, latents)
        script = self.folder / "script.pt"
        torch.jit.script(MeanColour()).save(script)
        self.add("TorchScript", script, lambda: grading.Inception(script))

    def run_folder(self):
        folder = save_run(self.pipeline, self.folder / "run")

        def draw():
            sample.load_run(folder, "cpu", "fp32").generate(["a"], steps=1)
        self.add("config.json", folder / "config.json", draw)
        self.add("model.safetensors", folder / "model.safetensors", draw)
        torch.save({"model": self.pipeline.model.state_dict()}, self.folder / "u.pth")
        self.add("weights .pth", self.folder / "u.pth", lambda: common.load_into(
            self.pipeline.model, common.read_weights(self.folder / "u.pth", "u.pth"), "u.pth"))
        common.write_results(folder, {"all": 1.0})
        self.add("results.json", folder / "results.json",
                 lambda: common.write_results(folder, {"all": 1.0}))
        self.train(False)
        for name in ("config.json", "state.pt", "metrics.csv"):
            self.add(f"resumed {name}", self.folder / "resumed" / name, lambda: self.train(True))

    def train(self, resume):
        """Two steps, or the last one again."""
        cfg = tiny_cfg(self.clip, steps=2)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        args = argparse.Namespace(resume=resume, overwrite=False)
        run = common.Run(self.folder / "resumed", cfg, [model, optimizer], model.state_dict(), args,
                         "fp32", save_every=1)
        for step in range(run.start + 1, 3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            run.log(step, loss=1.0)
            if run.due(step) and not (resume or step == 2):
                run.save(step)
        run.plot()

    def text_models(self):
        """Files of a CLIP: as a text encoder, as a scorer, and the head on its features."""
        folder = self.folder / "clip"
        load = encoders.TextEncoder                  # which `main` replaces for the other kinds
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            self.add(f"clip's {name}", folder / name, lambda: load(folder)(["a picture"]))
        self.add("clip's weights", folder / "model.safetensors",
                 lambda: encoders.ClipScorer(folder).texts(["a picture"]))
        shutil.copytree(folder, self.folder / "words")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            self.add(f"words' {name}", self.folder / "words" / name,
                     lambda: load(self.folder / "words")(["a picture"]))
        clip = encoders.ClipScorer(folder)
        scorer = self.folder / "scorer.safetensors"
        common.save_tensors({"weight": torch.ones(1, clip.dim), "bias": torch.ones(1)}, scorer)
        images = np.zeros((1, 24, 24, 3), np.uint8)
        self.add("scorer", scorer, lambda: encoders.AestheticScorer(scorer, clip)(images))

    def methods(self):
        groups = self.folder / "groups.jsonl"
        groups.write_text('{"pictures": ["a.png"], "texts": ["a dog", "a cat"], "right": 0}\n'
                          '{"pictures": ["a.png", "a.jpg"], "texts": ["a dog", "a cat"]}\n')
        self.add("groups.jsonl", groups, lambda: matching.read_groups(groups))
        pairs = self.folder / "pairs.jsonl"
        pairs.write_text('{"text": "ein Hund", "english": "a dog"}\n' * 3)
        self.add("pairs.jsonl", pairs, lambda: common.read_json_lines(
            pairs, pairs, ("text", "english")))
        items = image_data.CaptionedImages(self.folder / "coco", "train", 8).items
        scores = self.folder / "scores.json"
        scores.write_text(json.dumps({path.name: 0.5 for path, _, _ in items}))
        comvg = self.folder / "comvg.csv"
        comvg.write_text("sentence,pos_triplet,neg_triplet,pos_image_id,neg_image_id\n"
                         + 'a dog runs,"dog,run,grass","dog,sit,grass",a,b\n' * 3)
        self.add("ComVG", comvg, lambda: rivals.read_comvg(comvg, self.folder))
        rewards_cfg = fine_rewards.Config()
        chosen = self.folder / "round1" / "chosen.pt"
        images = np.zeros((2, 8, 8, 3), np.uint8)
        fine_rewards.save_chosen(rewards_cfg, chosen.parent, images=images, rejected=images,
                                 prompts=["a", "b"])
        self.add("chosen.pt", chosen, lambda: fine_rewards.load_chosen(rewards_cfg, chosen.parent))
        narratives = self.folder / "lists" / "narratives.txt"
        narratives.write_text("a picture in other words\n\nand another\n")
        for path in (narratives, self.folder / "lists" / "metadata.jsonl"):
            self.add(f"triples: {path.name}", path,
                     lambda: sur_adapter.load_triples(self.pipeline, self.folder / "lists"))
        cfg = llm_adapter.Config(quality=str(scores), quality_split="train")
        self.add("scores", scores, lambda: llm_adapter.best_items(
            cfg, self.folder / "coco", 8))


class TooLong(BaseException):
    """Raised by the alarm."""


def give_up(*_):
    raise TooLong


def attempt(action, report):
    """Runs one reading; returns "sound", "one line" or "traceback", which goes to `report`."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            common.entry(action)
        return "sound"
    except SystemExit as stop:
        lines = [line for line in errors.getvalue().splitlines() if line.strip()]
        if stop.code == 2 and lines and ": error: " in lines[-1]:
            return "one line"
        report.append(errors.getvalue()[-500:])
    except TooLong:
        report.append("more than 20 seconds")
    except Exception:
        report.append(traceback.format_exc())
    return "traceback"


def fuzz_files(files, seconds, rng, only=""):
    """{kind: Counter of outcomes}; the kinds take turns until the time is over."""
    outcomes = collections.defaultdict(collections.Counter)
    reports = collections.defaultdict(list)
    kinds = {kind: value for kind, value in files.kinds.items() if only in kind}
    end = time.time() + seconds
    while kinds and time.time() < end:
        for kind, (path, read) in kinds.items():
            sound = path.read_bytes()
            if kind in outcomes:                     # undamaged the first time
                damage_file(path, rng)
            signal.alarm(20)
            outcome = attempt(read, reports[kind])
            signal.alarm(0)
            assert kind in outcomes or outcome == "sound", (kind, reports[kind])
            outcomes[kind][outcome] += 1
            path.write_bytes(sound)
    return outcomes, reports


# --------------------------------------------------------------------------------- command lines
NUMBERS = ["0", "-1", "1", "3", "0.5", "nan", "x", "", "inf", "1e300", "1000000", "100000000",
           "9" * 30]
TEXTS = ["", "x", "nowhere", "/dev/null", ".", "data", "a.png", "\udcff", "\u00e9" * 300, "-",
         "groups.jsonl", "meta"]


# many of them may take long
MANY = ["steps", "samples", "per_prompt", "prompts", "rounds", "candidates"]


def base_commands(folder, clip):
    """{script: its flags for the least work}; the folder gets what they need."""
    device = ["--device", "cpu", "--precision", "fp32"]
    llm = folder / "llm"
    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = train_tokenizer(["a picture told in some way"], 300, 64, "<|start|> $A")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64)).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    base = save_run(tiny_pipeline(clip, size=24, patch=8), folder / "runs" / "uvit_fusion")
    shutil.copy(base / "model.safetensors", base / "step1400.safetensors")
    shutil.copytree(folder / "lists", folder / "data")
    train = ["--train", "--overwrite", "--data", "data", "--batch-size", "2"]
    adapter = [*train, "--llm", llm, *device]
    return {
        "uvit_fusion.py": [*train, "--out", "new", "--clip", clip, *TINY, "--steps", "1", *device],
        "sample.py": ["a picture", "--sample-steps", "1", *device],
        "eval.py": ["--quality", "--data", "coco", "--samples", "2", "--sample-steps", "1",
                    *device],
        "dsd.py": [*train, "--data", "groups.jsonl", "--steps", "1", "--negatives", "1",
                   *device],
        "llm_adapter.py": [*adapter, "--steps-1", "1", "--steps-2", "1", "--steps-3", "1",
                           "--width", "8", "--quality", "stars", "--quality-split", "train"],
        "sur_adapter.py": [*adapter, "--steps", "1"],
        # no model of the toy world, which would be trained first
        "fine_rewards.py": [*train, "--llm", llm, *"--captioner x --segmenter x".split(),
                            *"--weights 0 0 1 0 --prompts 4 --candidates 2".split(),
                            "--steps", "1", "--rounds", "1", "--sample-steps", "1", *device],
        "experiments.dsd": ["grade", "--groups", "groups.jsonl", "--run", "runs/uvit_fusion",
                            *device],
        "experiments.own_data": ["photographs", *train[1:], "--out", "photographs", "--clip", clip,
                                 *TINY, "--steps", "1", *device],
    }


def actions_of(script, folder):
    """The flags that a script knows, except --compile, which takes minutes."""
    found = []

    def stop(parser):
        found.extend(parser._actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for task in action.choices.values():
                    found.extend(task._actions)
        raise SystemExit
    parse_args = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = stop
    run(script, cwd=folder)
    argparse.ArgumentParser.parse_args = parse_args
    return [action for action in found
            if action.option_strings and action.dest not in ("help", "compile")]


def odd_flag(action, rng):
    """A flag with a value that a user may give it, even by a typo."""
    if action.nargs == 0:
        return [rng.choice(action.option_strings)]
    count = action.nargs if isinstance(action.nargs, int) else 1
    values = NUMBERS if action.type is not None and action.type is not str else TEXTS
    if any(word in action.dest for word in MANY):
        values = NUMBERS[:8]
    values = [*values, *map(str, action.choices or ())]
    return [action.option_strings[0], *(rng.choice(values) for _ in range(count))]


def fuzz_commands(commands, folder, seconds, rng):
    """The same outcomes for command lines: {script: Counter}."""
    outcomes = collections.defaultdict(collections.Counter)
    reports = collections.defaultdict(list)
    actions = {script: actions_of(script, folder) for script in commands}
    end = time.time() + seconds
    while time.time() < end:
        for script, flags in commands.items():
            odd = []
            if script in outcomes:                   # no odd flag the first time
                for action in rng.sample(actions[script], rng.choice((1, 1, 2))):
                    odd += odd_flag(action, rng)
            signal.alarm(30)
            outcome = "traceback"
            try:
                result = run(script, *flags, *odd, cwd=folder)
                outcome = "sound"
                if result[0]:
                    refused(result)
                    outcome = "one line"
            except TooLong:
                reports[script].append(f"{odd}: more than 30 seconds")
            except (Exception, AssertionError):
                reports[script].append(f"{odd}\n{traceback.format_exc()}")
            signal.alarm(0)
            assert odd or outcome == "sound", (script, *reports[script])
            outcomes[script][outcome] += 1
    return outcomes, reports


def print_outcomes(title, outcomes, reports, shown):
    rows = [[title, "sound", "one line", "traceback"]]
    for kind, counts in outcomes.items():
        rows.append([kind, counts["sound"], counts["one line"], counts["traceback"]])
    rows.append(["all", *(sum(column) for column in list(zip(*rows[1:]))[1:])])
    common.print_table(rows)
    for kind, found in reports.items():
        for report in found[:shown]:
            print(f"\n{kind}:\n{report}")
    return rows[-1][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="for each of the two parts")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is damaged and how")
    parser.add_argument("--only", default="", help="kinds of files or \"commands\"")
    parser.add_argument("--show", type=int, default=1, help="tracebacks of each kind to print")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, give_up)
    memory = 16 * 2**30                              # huge values must not take it all
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clip = make_clip(folder / "clip")
        files = Files(folder, clip)
        encoder = files.pipeline.text_encoder        # loading it each time would take too long
        with mock.patch.object(encoders, "TextEncoder", lambda *_: encoder):
            found = fuzz_files(files, args.seconds, rng, args.only)
        failures = print_outcomes("damaged files", *found, args.show)
        if not args.only or args.only == "commands":
            found = fuzz_commands(base_commands(folder, clip), folder, args.seconds, rng)
            failures += print_outcomes("command lines", *found, args.show)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
