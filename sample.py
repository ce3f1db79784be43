"""Prompts to pictures, from any checkpoint of any method.

    python sample.py "two red circles above a blue square" "three green triangles"
    python sample.py --file prompts.txt --per-prompt 4 --guidance 3 --noise-seed 1
    echo "a yellow square" | python sample.py -
    python sample.py "a green train" --weights mscoco_uvit_small.pth --autoencoder autoencoder_kl.pth --guidance 2
    python sample.py "a trio of balls the colour of grass" --adapter runs/sur_adapter      # the flagship with an adapter: sur_adapter.py
    python sample.py "four purple discs" --film          # the denoising as a strip: what the network believes x_0 to be, step by step

Writes one captioned grid, one file a picture with --singles, and prints where. The same seed gives the same pictures.
"""
import argparse
import contextlib
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import common
from common import UserError

# ----------------------------------------------------------------------------------------------------------- checkpoints
METHODS = ("uvit_fusion", "llm_adapter", "sur_adapter", "fine_rewards")


def load_run(path, device="auto", precision="auto"):
    """Loads a run folder, or a .safetensors file in one, by the method that its config.json names; returns the method's painter.

    device, precision: as the flags name them.
    """
    folder, _ = common.run_files(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no run in {folder}/ (no config.json): train one first, python uvit_fusion.py --train")
    config = common.read_json(folder / "config.json")
    method = config.get("method") if isinstance(config, dict) else None
    if method not in METHODS:
        raise UserError(f"{folder}/config.json names the method {method!r}; known are {', '.join(METHODS)}")
    device = common.pick_device(device)
    return importlib.import_module(method).load(path, device, common.pick_precision(precision, device))


def load_or_train(path, device, precision):
    """The painter of a base model, as `load_run`; the toy world's flagship is trained first if it is not there."""
    folder, _ = common.run_files(path)
    if folder == Path("runs/uvit_fusion") and not (folder / "model.safetensors").exists():
        print(f"there is no flagship in {folder}/ yet: training it first, as python uvit_fusion.py --train does")
        script = Path(__file__).with_name("uvit_fusion.py")
        if code := subprocess.run([sys.executable, script, "--train", "--device", device, "--precision", precision]).returncode:
            sys.exit(code)                                                            # it has said why
    return load_run(path, device, precision)


def load_published(weights, autoencoder, clip, device, precision):
    """The painter of a published U-ViT for text (mscoco_uvit_small.pth, mscoco_uvit_small_deep.pth). The sizes are read off its tensors."""
    from uvit_fusion import PRESETS, Settings, make_painter
    tensors, clip = common.read_weights(weights, f"--weights {weights}"), clip or PRESETS["coco"]["clip"]
    try:
        dim, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        text_dim, tokens = tensors["context_embed.weight"].shape[1], tensors["pos_embed"].shape[1]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"--weights {weights} is no U-ViT for text (no context_embed, patch_embed or pos_embed as it should be)") from None
    encoder = common.TextEncoder(clip, device)
    length = encoder.length
    s = Settings(**PRESETS["coco"] | dict(
        size=patch * math.isqrt(max(1, tokens - 1 - length)), channels=channels, text_dim=text_dim, text_length=length, patch=patch, dim=dim,
        depth=2 * len({name.split(".")[1] for name in tensors if name.startswith("in_blocks.")}), heads=max(1, dim // 64),
        image_blocks=0, caption_blocks=0, autoencoder=autoencoder or "", clip=clip))
    return make_painter(s, encoder, tensors, weights, Path("runs") / Path(weights).stem, precision)


def add_run_flags(parser):
    parser.add_argument("--run", default="runs/uvit_fusion", help="run folder, or a .safetensors file in one (default %(default)s)")
    parser.add_argument("--weights", help="published U-ViT weights (mscoco_uvit_small.pth, ...) in the place of a run")
    parser.add_argument("--autoencoder", help="--weights: the Stable Diffusion autoencoder, a file or a folder of diffusers")
    parser.add_argument("--clip", help="--weights: the text encoder (default openai/clip-vit-large-patch14)")
    common.add_machine_flags(parser)


def load_painter(args):
    """The painter that the flags of `add_run_flags` name: of a run, or of published weights."""
    if not args.weights:
        if args.autoencoder or args.clip:
            raise UserError("--autoencoder and --clip go with --weights: a run knows its own")
        return load_run(args.run, args.device, args.precision)
    device = common.pick_device(args.device)
    return load_published(args.weights, args.autoencoder, args.clip, device, common.pick_precision(args.precision, device))


def add_sampling_flags(parser):
    parser.add_argument("--sample-steps", type=common.positive, default=25,
                        help="network evaluations a picture, guidance not counted (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="w in uncond + w (cond - uncond); 1: the conditional model (default: the run's own)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="guide only where t / T is within; outside, a step costs half (default: the run's, 0.6 1 in the toy world, else 0 1)")
    parser.add_argument("--sampler", help="ddpm, ddim or dpm, DPM-Solver++ 2M (default: the run's, ddpm in the toy world, else dpm)")
    parser.add_argument("--negative", default="", help="negative prompt, in the place of the empty one")
    parser.add_argument("--noise-seed", type=int, choices=range(10**6), metavar="N", default=0,
                        help="seed of the noise that pictures start from (default %(default)s)")


def sampling(args):
    """The keyword arguments of a painter's draw() from the flags above."""
    return dict(steps=args.sample_steps, guidance=args.guidance, interval=args.guidance_interval, sampler=args.sampler,
                negative=args.negative, seed=args.noise_seed)


# -------------------------------------------------------------------------------------------------------------- pictures
FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc",            # accents
         "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",    # and Chinese
         "PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "Arial Unicode.ttf", "msyh.ttc", "simsun.ttc")
CJK = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"          # ideographs, kana and their punctuation: written without spaces


def lacking(face, texts):
    """The letters of the texts that a font lacks, in one string."""
    def drawn(letter):
        mask = face.getmask(letter)
        return mask.size, bytes(mask)
    box = drawn("\uffff")                                             # no letter: a font draws what it draws for all that it lacks
    return "".join(letter for letter in sorted(set("".join(texts))) if not letter.isspace() and drawn(letter) == box)


def font(texts=(), path=None, size=11):
    """The first font of the system that has all letters of the texts, or else lacks fewest; or the file that --font names. Says what is missing."""
    faces = []
    for name in [path] if path else FONTS:
        with contextlib.suppress(OSError):
            faces.append(ImageFont.truetype(name, size))
            if not lacking(faces[-1], texts):
                return faces[-1]
    if path and not faces:
        raise UserError(f"--font {path} is not a font file that can be read")
    face = min(faces or [ImageFont.load_default(size)], key=lambda face: len(lacking(face, texts)))
    if missing := lacking(face, texts):
        print(f"{f'--font {path} lacks' if path else 'no font found here has all'} letters of the captions, missing are {missing[:40]}"
              "; --font FILE names another")
    return face


def wrap(text, width, face):
    """Breaks a text into lines of at most `width` pixels: at spaces, behind hyphens, and between Chinese letters, but not before their stops."""
    lines = [""]
    for space, word in re.findall(rf"(\s*)([{CJK}][，。、；：！？）》」]*|[^\s{CJK}-]*-+|[^\s{CJK}-]+)", text):
        longer = lines[-1] + (" " if space and lines[-1] else "") + word
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def picture_grid(pictures, texts, path, columns=None, face=None, titles=()):
    """Writes pictures, N of (H, W, 3) uint8, as a grid, each with its text below; `titles` stand at the left of the rows."""
    n, h = len(pictures), len(pictures[0])
    side, gap, line = max(96, h), 8, 14
    columns = columns or min(n, max(4, math.ceil(math.sqrt(n))))
    face = face or font([*texts, *titles])
    wrapped, heads = [wrap(text, side, face) for text in texts], [wrap(title, 150 if len(title) < 150 else 500, face) for title in titles]
    left = int(max((face.getlength(part) for lines in heads for part in lines), default=-gap)) + 2 * gap
    tops = [gap]                                                     # of the rows; one without texts leaves no room for them
    for row in range(0, n, columns):
        lines = max(len(wrapped[i]) if texts[i] else 0 for i in range(row, min(row + columns, n)))
        below, head = lines * line + 4 if lines else 0, len(heads[row // columns]) * line if heads else 0
        tops.append(tops[-1] + max(side + below, head) + gap)
    sheet = Image.new("RGB", (left + columns * (side + gap), tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)

    def write(lines, x, y):
        for k, text in enumerate(lines):
            draw.text((x, y + k * line), text, fill="black", font=face)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped)):
        x, y = left + i % columns * (side + gap), tops[i // columns]
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST if h < side else Image.Resampling.LANCZOS), (x, y))
        write(lines, x, y + side + 2)
    for lines, y in zip(heads, tops):
        write(lines, gap, y + max(0, side / 2 - len(lines) / 2 * line))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def plot(curves, path, x_label, y_label, log=False, size=(640, 360)):
    """Draws curves {name: [(x, y), ...]} with axes and a legend."""
    colours = ["#2c5cd2", "#d6302c", "#34a046", "#963cb0", "#e08a1e", "#555555"]
    curves = {name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)] for name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    scale = math.log10 if log else float
    xs, ys = [p[0] for p in points], [scale(p[1]) for p in points]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(max(ys), min(ys) + 1e-9)
    if not log and 0 <= y0 < 0.5 * y1:
        y0 = 0
    sheet = Image.new("RGB", size, "white")
    draw, face = ImageDraw.Draw(sheet), font()
    left, top, right, bottom = 64, 16, size[0] - 16, size[1] - 40

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (scale(y) - y0) / (y1 - y0) * (bottom - top)
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        py = bottom - (bottom - top) * i / 4
        draw.line((left, py, right, py), fill="#dddddd")
        draw.text((left - 6, py), f"{10**y if log else y:.3g}", fill="black", font=face, anchor="rm")
    few = sorted(set(xs)) if len(set(xs)) <= 9 else [x0 + (x1 - x0) * i / 4 for i in range(5)]      # whole curves: even ticks
    for x in few:
        draw.text((left + (x - x0) / (x1 - x0) * (right - left), bottom + 4), f"{x:.0f}", fill="black", font=face, anchor="ma")
    draw.text(((left + right) / 2, size[1] - 18), x_label, fill="black", font=face, anchor="ma")
    draw.text((left, 2), y_label, fill="black", font=face)
    high = sum(scale(curve[-1][1]) for curve in curves.values() if curve) / len(curves) > (y0 + y1) / 2
    legend = bottom - 4 - 14 * len(curves) if high else top + 4                   # where the curves do not end
    for i, (name, curve) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        if len(curve) > 1:
            draw.line([at(x, y) for x, y in curve], fill=colour, width=2)
        for x, y in curve if len(curve) < 20 else []:
            px, py = at(x, y)
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
        draw.text((right - 6, legend + 14 * i), name, fill=colour, font=face, anchor="ra")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------------ main
def read_prompts(args):
    """The prompts of the command line, of --file, or of standard input where the prompt is "-"."""
    prompts = list(args.prompts)
    if args.file:
        try:
            prompts += Path(args.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {args.file} cannot be read ({error})") from None
    if "-" in prompts:
        prompts = [p for p in prompts if p != "-"] + sys.stdin.read().splitlines()
    return [p.strip() for p in prompts if p.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", help='prompts in quotes, or "-" to read them from standard input, one a line')
    parser.add_argument("--file", help="a text file with one prompt a line")
    parser.add_argument("--out", help="the grid's file (default <run>/samples/prompts.png)")
    parser.add_argument("--singles", action="store_true", help="also write each picture as a file of its own, at its own size, beside the grid")
    parser.add_argument("--film", action="store_true", help="draw the denoising: one row a prompt, the predicted x_0 of each step")
    parser.add_argument("--per-prompt", type=common.positive, default=1, help="pictures a prompt (default %(default)s)")
    parser.add_argument("--columns", type=common.positive, help="pictures in a row of the grid")
    parser.add_argument("--font", help="font file for the captions, for letters that the system's own lacks")
    parser.add_argument("--adapter", help="run of sur_adapter.py, whose adapter is put behind the text encoder of --run")
    add_run_flags(parser)
    add_sampling_flags(parser)
    args = parser.parse_args()
    prompts = read_prompts(args)
    if not prompts:
        parser.print_help()
        return
    if args.out and Path(args.out).suffix.lower() not in common.PICTURES:
        raise UserError(f"--out {args.out}: name a picture file, such as {args.out}.png")
    painter = load_painter(args)
    if args.adapter:
        painter = importlib.import_module("sur_adapter").attach(painter, args.adapter)
    face = font(prompts, args.font)
    texts = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    film = [] if args.film else None
    pictures = painter.draw(texts, **sampling(args), film=film, progress=True)
    out = Path(args.out or painter.folder / "samples" / ("film.png" if args.film else "prompts.png"))
    if args.film:
        strip = [frame[i] for i in range(len(texts)) for frame in film]
        labels = [f"step {k + 1}" for k in range(len(film))] * len(texts)
        picture_grid(strip, labels, out, columns=len(film), face=face, titles=texts)
    else:
        picture_grid(pictures, texts, out, columns=args.columns or (args.per_prompt if args.per_prompt > 1 else None), face=face)
    print(f"{len(texts)} pictures: {out}")
    if args.singles:
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(out.with_name(f"{out.stem}_{i:04d}.png"))
        print(f"one by one: {out.stem}_0000.png to {out.stem}_{len(texts) - 1:04d}.png beside it")


if __name__ == "__main__":
    common.entry(main)
