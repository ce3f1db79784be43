"""Prompts to images, from any run that generates them (all methods but dsd.py).

    python sample.py "two red circles above a blue square" "three green triangles"
    python sample.py --file prompts.txt --per-prompt 4 --guidance 3 --noise-seed 1
    python sample.py "four purple circles" --trajectory          # the predicted x_0, step by step
    python sample.py "four purple circles" --trajectory --out film.gif       # the same as a film
    python sample.py "four purple circles" "a red disc" --vary guidance 1 3 8    # a row per value
    python sample.py "a trio of balls the colour of grass" --adapter runs/sur_adapter
    python sample.py "a train" --weights mscoco_uvit_small.pth --autoencoder autoencoder_kl.pth

Writes one grid, each image above its prompt: samples/prompts.png in the run folder or, for a
.safetensors file, in a folder of its name. The same seed gives the same images.
"""
import argparse
import copy
import importlib
from pathlib import Path

from PIL import Image

import common
import encoders
import image_data
import uvit_fusion
from common import UserError

# a run's config.json names one of these files, whose load_pipeline(path, ...) loads it
METHODS = ("uvit_fusion", "llm_adapter", "sur_adapter", "fine_rewards")
DEFAULT_RUN = "runs/uvit_fusion"


# ----------------------------------------------------------------------------------------- loading
def load_run(path, device="auto", precision="auto", **changes):
    """The pipeline of a run folder, or of a .safetensors file in one, loaded by its method.

    changes: to the settings of its U-ViT, such as clip.
    """
    folder, _ = common.run_files(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no run in {folder}/ (no config.json): train one first "
                        "(python uvit_fusion.py --train)")
    config = common.read_json(folder / "config.json")
    method = config.get("method")
    if method not in METHODS:
        raise UserError(f"{folder}/config.json names the method {method!r}, not one of "
                        f"{', '.join(METHODS)}")
    device = common.pick_device(device)
    precision = common.pick_precision(precision, device)
    return importlib.import_module(method).load_pipeline(path, device, precision, **changes)


def load_published(args):
    """The pipeline of U-ViT's published weights, mscoco_uvit_small.pth or its _deep variant."""
    tensors = common.read_weights(args.weights, f"--weights {args.weights}")
    in_blocks = {name.split(".")[1] for name in tensors if name.startswith("in_blocks.")}
    preset = uvit_fusion.PRESETS["coco"]
    cfg = uvit_fusion.Config(**preset | {
        "depth": 2 * len(in_blocks),
        "image_blocks": 0,                                   # U-ViT itself: early fusion
        "caption_blocks": 0,
        "autoencoder": args.autoencoder or "",
        "clip": args.clip or preset["clip"],
    })
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    text_encoder = encoders.TextEncoder(cfg.clip, device)
    return uvit_fusion.make_pipeline(cfg, text_encoder, tensors, args.weights, precision)


def add_run_flags(parser):
    parser.add_argument("--run", default=DEFAULT_RUN,
                        help="run folder, or a .safetensors file in one (default %(default)s)")
    parser.add_argument("--weights", help="published U-ViT weights instead of a run")
    parser.add_argument("--autoencoder",
                        help="file or folder of the autoencoder (default: the run's)")
    parser.add_argument("--clip", help="text encoder, a folder or a name on the hub (default: the "
                                       "run's; with --weights CLIP ViT-L/14)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile, for many images on a GPU (takes a minute)")
    common.add_device_flags(parser)


def load_pipeline(args):
    """The pipeline that the flags of `add_run_flags` name."""
    if args.weights and args.run != DEFAULT_RUN:
        raise UserError("--weights and --run both name a network: leave one out")
    if args.weights:
        pipeline = load_published(args)
    else:
        changes = {name: getattr(args, name) for name in ("autoencoder", "clip")
                   if getattr(args, name)}
        pipeline = load_run(args.run, args.device, args.precision, **changes)
    if args.compile:                                         # sampling calls it, not `forward`
        pipeline.model.denoise = uvit_fusion.compile_network(
            pipeline.model.denoise, pipeline.device)
    return pipeline


def output_folder(args):
    """Where results go: the run folder; for a .safetensors file in it, a folder of its name."""
    if args.weights:
        return Path("runs") / Path(args.weights).stem            # published weights have no run
    if Path(args.run).suffix == ".safetensors":
        return Path(args.run).with_suffix("")
    return Path(args.run)


# ---------------------------------------------------------------------------------------- sampling
def add_sampling_flags(parser):
    parser.add_argument("--sample-steps", type=common.positive, default=25,
                        help="network evaluations per image (default %(default)s)")
    parser.add_argument("--guidance", type=common.finite,
                        help="w of uncond + w (cond - uncond), 1: none (default: the run's)")
    parser.add_argument("--guidance-interval", type=common.finite, nargs=2,
                        metavar=("LOW", "HIGH"),
                        help="guide only at t / T in this range (default: the run's)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm"),
                        help="dpm: DPM-Solver++ 2M (default: the run's)")
    parser.add_argument("--negative-prompt", default="",
                        help="text to use in place of the empty prompt in guidance")
    parser.add_argument("--noise-seed", type=common.whole, default=0,
                        help="seed of the noise that images start from (default %(default)s)")


def sampling_options(args):
    """The flags of `add_sampling_flags` as keyword arguments of `Pipeline.generate`."""
    if args.guidance_interval:
        uvit_fusion.check_interval(args.guidance_interval)
    return dict(steps=args.sample_steps, guidance=args.guidance,
                guidance_interval=args.guidance_interval, sampler=args.sampler,
                negative_prompt=args.negative_prompt, seed=args.noise_seed)


# ------------------------------------------------------------------------------- prompts and grids
def read_prompts(args):
    """The prompts of the command line and of --file."""
    prompts = list(args.prompts)
    if args.file:
        prompts += common.read_text(args.file).splitlines()
    return [image_data.one_line(prompt) for prompt in prompts if prompt.strip()]


VARIED = ("guidance", "sampler", "sample-steps", "run")


def varied_args(parser, args):
    """The args for each row of --vary: those of the command line, with one value of the flag."""
    name, *values = args.vary
    if name not in VARIED or not values:
        raise UserError(f"--vary {' '.join(args.vary)}: expected one of {', '.join(VARIED)}, and "
                        "its values")
    field = name.replace("-", "_")
    if getattr(args, field) != parser.get_default(field):
        raise UserError(f"--{name}: --vary sets its values, leave it out")
    # parsed like the flag itself, so a wrong value gets the same message
    return [parser.parse_args([f"--{name}", value], copy.copy(args)) for value in values]


def draw_trajectory(trajectory, prompts, out, font):
    """A row for each image: its predicted x_0, step by step. trajectory: from `generate`."""
    frames = [images[i] for i in range(len(prompts)) for images in trajectory]
    labels = [f"step {k + 1}" for k in range(len(trajectory))] * len(prompts)
    common.image_grid(frames, labels, out, len(trajectory), titles=prompts, font=font)


def save_film(trajectory, prompts, out, columns, font):
    """An animated GIF: a grid of all images for each step; the last stays longer."""
    first, *others = [common.draw_grid(images, prompts, columns, font=font)
                      for images in trajectory]
    milliseconds = [150] * len(others) + [3000]
    with common.atomic_write(out) as unfinished:
        first.save(unfinished, "GIF", save_all=True, append_images=others, duration=milliseconds,
                   loop=0)


def generate_rows(rows, prompts, trajectory):
    """Images of all prompts, row after row, from the same noise; rows: the args of each row."""
    images = []
    loaded = None
    for args in rows:
        if args.run != loaded:                                   # --vary run: another one
            pipeline = load_pipeline(args)
            if args.adapter:
                pipeline = importlib.import_module("sur_adapter").attach(pipeline, args.adapter)
            loaded = args.run
        images += list(pipeline.generate(prompts, progress=True, trajectory=trajectory,
                                         **sampling_options(args)))
    return images


# ------------------------------------------------------------------------------------------- main
def add_flags(parser):
    parser.add_argument("prompts", nargs="*", help="prompts in quotes")
    parser.add_argument("--file", help="text file with one prompt per line")
    parser.add_argument("--per-prompt", type=common.positive, default=1,
                        help="images for each prompt (default %(default)s)")
    parser.add_argument("--adapter", help="run of sur_adapter.py, used after the text encoder")
    parser.add_argument("--trajectory", action="store_true",
                        help="show the predicted x_0 at every step, one row per image; with --out "
                             "NAME.gif, as a film")
    parser.add_argument("--vary", nargs="+", metavar=("FLAG", "VALUE"),
                        help="a row of images for each value of a flag, all from the same noise: "
                             f"{', '.join(VARIED)}")
    parser.add_argument("--out", help="file of the grid (default: samples/prompts.png in the run)")
    parser.add_argument("--singles", action="store_true",
                        help="also write each image to its own file, next to the grid")
    parser.add_argument("--font", help="font file for prompts in non-Latin scripts")
    add_run_flags(parser)
    add_sampling_flags(parser)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    args = parser.parse_args()
    rows = varied_args(parser, args) if args.vary else [args]
    prompts = read_prompts(args)
    if args.file and not prompts:
        raise UserError(f"--file {args.file} holds no prompt")
    if not prompts:
        parser.print_help()
        return
    out = Path(args.out or output_folder(args) / "samples" / "prompts.png")
    if out.suffix.lower() not in image_data.IMAGE_SUFFIXES:
        raise UserError(f"--out {out}: name an image file, such as {out}.png")
    if args.trajectory and args.vary:
        raise UserError("--trajectory and --vary both need the rows: choose one")
    if args.out:                                             # a bad one fails here, not at the end
        with common.reading(f"--out {out}", "name another file"):
            out.parent.mkdir(parents=True, exist_ok=True)
    font = common.load_font(args.font)
    prompts = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    columns = args.per_prompt if args.per_prompt > 1 else None   # a row per prompt
    trajectory = [] if args.trajectory else None                 # of each step: (N, H, W, 3)
    images = generate_rows(rows, prompts, trajectory)
    if args.vary:
        titles = [f"{args.vary[0]} {value}" for value in args.vary[1:]]
        texts = [""] * (len(images) - len(prompts)) + prompts    # below the last row
        common.image_grid(images, texts, out, len(prompts), titles=titles, font=font)
    elif args.trajectory and out.suffix.lower() == ".gif":
        save_film(trajectory, prompts, out, columns, font)
    elif args.trajectory:
        draw_trajectory(trajectory, prompts, out, font)
    else:
        common.image_grid(images, prompts, out, columns, font=font)
    print(f"{len(images)} images: {out}")
    if args.singles:
        for i, image in enumerate(images):
            common.save_image(Image.fromarray(image), out.with_name(f"{out.stem}_{i:04d}.png"))


if __name__ == "__main__":
    common.entry(main)
