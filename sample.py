"""Prompts to pictures, from any checkpoint of any method.

    python sample.py "two red circles above a blue square" "three green triangles"
    python sample.py --file prompts.txt --per-prompt 4 --guidance 3 --seed 1
    echo "a yellow square" | python sample.py -
    python sample.py "a green train" --weights mscoco_uvit_small.pth --autoencoder autoencoder_kl.pth --guidance 2
    python sample.py "four purple discs" --film          # the denoising as a strip: what the network believes x_0 to be, step by step

Writes one captioned grid, one file a picture with --singles, and prints where. The same seed gives the same pictures.
"""
import argparse
import sys
from pathlib import Path

from PIL import Image

import common
from common import UserError


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
    common.add_run_flags(parser)
    common.add_sampling_flags(parser)
    args = parser.parse_args()
    prompts = read_prompts(args)
    if not prompts:
        parser.print_help()
        return
    if args.out and Path(args.out).suffix.lower() not in common.PICTURES:
        raise UserError(f"--out {args.out}: name a picture file, such as {args.out}.png")
    painter = common.load_painter(args)
    face = common.font(11, args.font)
    texts = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    film = [] if args.film else None
    pictures = painter.draw(texts, **common.sampling(args), film=film, progress=True)
    out = Path(args.out or painter.folder / "samples" / ("film.png" if args.film else "prompts.png"))
    if args.film:
        strip = [frame[i] for i in range(len(texts)) for frame in film]
        labels = [f"step {k + 1}" for k in range(len(film))] * len(texts)
        common.picture_grid(strip, labels, out, columns=len(film), face=face, titles=texts)
    else:
        common.picture_grid(pictures, texts, out, columns=args.columns or (args.per_prompt if args.per_prompt > 1 else None), face=face)
    print(f"{len(texts)} pictures: {out}")
    if args.singles:
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(out.with_name(f"{out.stem}_{i:04d}.png"))
        print(f"one by one: {out.stem}_0000.png to {out.stem}_{len(texts) - 1:04d}.png beside it")


if __name__ == "__main__":
    common.entry(main)
