"""Grades any run that generates images: by exact judge, noise level, or CLIP score, CMMD, FID.

    python eval.py                         # 2 048 held-out captions, graded by the exact judge
    python eval.py --run runs/uvit_fusion/step1400.safetensors --samples 512
    python eval.py --by-noise              # at which noise levels a wrong word raises the loss
    python eval.py --quality               # CLIP score and CMMD; for the toy world, with its CLIP
    python eval.py --quality --weights mscoco_uvit_small.pth --autoencoder autoencoder_kl.pth \\
        --data path/to/coco --inception inception-2015-12-05.pt                    # FID as well

What --quality measures, with the features x of N generated images and y of real ones:

    CLIP score = mean of 2.5 max(cos(image, caption), 0)           Hessel et al. 2021, 2104.08718
    CMMD = 1000 (E k(x, x') + E k(y, y') - 2 E k(x, y))          Jayasumana et al. 2024, 2401.09603
           k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), sigma = 10, of CLIP features
    FID  = |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))     Heusel et al. 2017, 1706.08500
           mu and S are mean and covariance of Inception features

The papers' CLIP is ViT-B/32 for the score and ViT-L/14 at 336 pixels for CMMD. Figures from another
CLIP (--clip-model) cannot be compared with theirs. So those from the toy world's tiny CLIP are
called tiny_clip_score and tiny_clip_distance, and the FID of toy images toy_inception_distance.

Figures are printed as a table and written to results.json.
"""
import argparse
import hashlib
import random
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import encoders
import image_data
import sample
import toy
from common import UserError
from toy import by_noise, judge


# ---------------------------------------------------------------------------------------- features
class Inception:
    """An Inception network from a TorchScript file: images uint8 (B, H, W, 3) -> features (B, D).

    The file brings its own code, which also resizes the images. Its SHA-256 is printed before
    that code runs.
    """
    def __init__(self, path, device="cpu"):
        with open(path, "rb") as file:
            print(f"inception: {path}, SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}")
        self.device = device
        with common.reading(f"--inception {path}", "it is not a TorchScript file that gives "
                            "features (B, D) of images uint8 (B, 3, H, W)"):
            self.network = torch.jit.load(path, map_location=device).eval()
            arguments = [argument.name for argument in self.network.forward.schema.arguments]
            # StyleGAN's file gives classes unless it is asked for features
            self.flags = {"return_features": True} if "return_features" in arguments else {}
            _, _ = self(np.zeros((2, 64, 64, 3), np.uint8)).shape            # fails if not (B, D)

    @torch.no_grad()
    def __call__(self, images):
        x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).contiguous()
        return self.network(x, **self.flags).float()


def generated_images(pipeline, captions, sampling, batch_size=128):
    """Yields (images uint8 (B, H, W, 3), their captions); image i starts from noise i."""
    for start in tqdm(range(0, len(captions), batch_size), "generated images"):
        part = captions[start:start + batch_size]
        yield pipeline.generate(part, first=start, batch_size=batch_size, **sampling), part


def real_images(dataset, workers=None, batch_size=128):
    """Yields all images of a CaptionedImages in the same way, each with one of its captions."""
    loader = image_data.load_all(dataset, batch_size, "real images", workers)
    for images, captions, broken in loader:
        for reason in filter(None, broken):
            print(f"\nwarning: {reason}; another image takes its place")
        yield images.permute(0, 2, 3, 1), captions


def extract_features(batches, clip, inception=None):
    """CLIP features (N, D), Inception features (N, F) or None, and the N captions of batches."""
    clip_features = []
    inception_features = []
    captions = []
    for images, texts in batches:
        clip_features.append(clip.images(images).cpu())
        if inception:
            inception_features.append(inception(images).cpu())
        captions += texts
    inception_features = torch.cat(inception_features) if inception else None
    return torch.cat(clip_features), inception_features, captions


# ---------------------------------------------------------------------------------------- measures
def clip_score(clip, features, captions, batch_size=256):
    """2.5 max(cos(image, caption), 0): image features (N, D) and N captions -> (N,) float64"""
    scores = []
    for start in range(0, len(captions), batch_size):
        part = features[start:start + batch_size].to(clip.device)
        scores.append(clip.score(part, captions[start:start + batch_size]).cpu())
    return torch.cat(scores).double().numpy()


def mean_kernel(a, b, sigma, rows=256):
    """E k(a, b) over all pairs, k(a, b) = exp(-|a - b|^2 / (2 sigma^2)): (N, D), (M, D) -> float"""
    total = 0.0
    for start in range(0, len(a), rows):                 # the whole (N, M) would take gigabytes
        part = a[start:start + rows]
        squared = (part**2).sum(1)[:, None] + (b**2).sum(1) - 2 * part @ b.T         # (rows, M)
        total += np.exp(-squared / (2 * sigma**2)).sum()
    return total / (len(a) * len(b))


def cmmd(x, y, sigma=10.0):
    """1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)), of CLIP features x (N, D) and y (M, D).

    As in the paper's code, the means are over all pairs, including each image with itself.
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    same = mean_kernel(x, x, sigma) + mean_kernel(y, y, sigma)
    return float(1000 * (same - 2 * mean_kernel(x, y, sigma)))


# ----------------------------------------------------------------------------------------- quality
def quality(pipeline, dataset, samples, clip, inception, sampling, workers=None):
    """Generates images for captions of `dataset` and compares them with its own: {name: figure}.

    clip: a `ClipScorer`; inception: an `Inception`, or None; sampling: for `pipeline.generate`.
    """
    if min(samples, len(dataset)) < 2:
        raise UserError(f"{samples} generated and {len(dataset)} real images: take at least 2")
    y, y_inception, y_captions = extract_features(real_images(dataset, workers), clip, inception)
    captions = []
    for i in range(samples):
        texts = dataset.items[i % len(dataset)][1]
        captions.append(random.Random(i).choice(texts))
    x, x_inception, _ = extract_features(
        generated_images(pipeline, captions, sampling), clip, inception)

    score = "tiny_clip_score" if clip.tiny else "clip_score"
    scores = clip_score(clip, x, captions)
    figures = {
        score: float(scores.mean()),
        f"{score}_ci": common.ci95(scores),
        f"{score}_real": float(clip_score(clip, y, y_captions).mean()),
        "tiny_clip_distance" if clip.tiny else "cmmd": cmmd(x, y),
    }
    if inception:
        toy_images = "scene" in dataset.items[0][2]
        figures["toy_inception_distance" if toy_images else "fid"] = common.frechet_distance(
            x_inception, y_inception)
    figures["quality_samples"] = samples
    return figures


def measure_quality(args, pipeline, data, title):
    """Prints and returns the figures of --quality."""
    dataset = image_data.CaptionedImages(data, "val", pipeline.image_size)
    samples = args.samples or min(30_000, len(dataset))
    path = args.clip_model or pipeline.cfg.clip
    if not args.clip_model and Path(path).name == "words":
        raise UserError("--quality: the run learned its own word embeddings, which see no images: "
                        "name a CLIP with --clip-model")
    clip = encoders.ClipScorer(path, pipeline.device)
    inception = Inception(args.inception, pipeline.device) if args.inception else None
    figures = quality(pipeline, dataset, samples, clip, inception,
                      sample.sampling_options(args), args.workers)
    rows = [["figure", "value"]]
    rows += [[name, f"{value:.5g}"] for name, value in figures.items()]
    common.print_table(rows, f"{title}; against {data}; CLIP: {clip.path}")
    if samples < 10_000:
        print("distances are too high for few images: compare them at equal numbers only")
    return figures


# -------------------------------------------------------------------------------------------- main
def add_flags(parser):
    sample.add_run_flags(parser)
    parser.add_argument("--data", help="data to take captions from (default: the run's)")
    parser.add_argument("--samples", type=common.positive,
                        help="images to generate (default 2048; with --quality 30 000, or all "
                             "validation captions if fewer); with --by-noise, scenes to look "
                             "at (512)")
    parser.add_argument("--out", help="folder of results.json (default: the run's)")
    sample.add_sampling_flags(parser)
    measures = parser.add_mutually_exclusive_group()
    measures.add_argument("--by-noise", action="store_true",
                          help="instead: the loss with right and wrong captions by noise level")
    measures.add_argument("--quality", action="store_true",
                          help="instead: CLIP score, CMMD and FID")
    group = parser.add_argument_group("for --quality")
    group.add_argument("--clip-model", help="CLIP to measure with, a folder or a name on the hub "
                                            "(default: the one whose text model the run uses)")
    group.add_argument("--inception", help="TorchScript file such as inception-2015-12-05.pt, for "
                                           "FID; its code is run: use only one you trust")
    group.add_argument("--workers", type=common.natural, help="processes that read images")


def check_flags(parser, args):
    """Refuses flags that the chosen measure does not use."""
    if not args.quality:
        of_quality = ("clip_model", "inception", "workers")
        common.refuse_flags(parser, args, of_quality, "it needs --quality")
    if args.by_noise:
        of_sampling = ("sample_steps", "guidance", "guidance_interval", "sampler",
                       "negative_prompt")
        common.refuse_flags(parser, args, of_sampling, "--by-noise generates no images")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    args = parser.parse_args()
    check_flags(parser, args)
    pipeline = sample.load_pipeline(args)
    cfg = pipeline.cfg
    data = toy.prepare(args.data or cfg.data, cfg.clip, pipeline.image_size)
    folder = Path(args.out or sample.output_folder(args))
    name = args.weights or args.run
    guidance = cfg.guidance if args.guidance is None else args.guidance
    how = f"{args.sample_steps} steps of {args.sampler or cfg.sampler}, guidance {guidance:g}"
    if args.quality:
        figures = measure_quality(args, pipeline, data, f"{name}, {how}")
    elif args.by_noise:
        found = by_noise.measure(pipeline, data, args.samples or 512, args.noise_seed)
        figures = by_noise.report(found, f"{name}: right and wrong captions, by noise level",
                                  folder / "by_noise.png")
    else:
        figures, table = judge.accuracy(
            pipeline, data, args.samples or 2048, **sample.sampling_options(args))
        judge.print_accuracy(figures, table,
                             f"{name}: {figures['samples']} held-out captions, {how}")
    common.write_results(folder, figures)


if __name__ == "__main__":
    common.entry(main)
