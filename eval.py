"""Measures any checkpoint: exact alignment on the toy world; picture quality; what early and intermediate fusion cost; attention to text.

    python eval.py                                       # held-out captions drawn by runs/uvit_fusion and graded by the exact judge
    python eval.py --run runs/uvit_fusion/early.safetensors --samples 512
    python eval.py --quality                             # CLIP score, CMMD and (--inception FILE) FID; in the toy world, its own like of them
    python eval.py --steps-curve                         # accuracy against the number of sampling steps, for the three samplers
    python eval.py --cost                                # parameters, GFLOPs and milliseconds, at the sizes "toy" and "coco", side by side

The table is printed and its figures are written to results.json in the run folder (`--cost`: runs/cost/).
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import common
import sample
import toy
import uvit_fusion
from common import UserError


# --------------------------------------------------------------------------------------------------------------- results
def machine():
    """The machine's processor or GPU in words, for results.json."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def peak_memory_mb():
    """The most memory this process has held so far, in MB (nan where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def write_results(folder, figures):
    """Adds figures (name -> number) to <folder>/results.json, with the commit, the machine and the command they come from."""
    path = Path(folder) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = ""
    with contextlib.suppress(OSError):                                  # no git
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    results = common.read_json(path) if path.exists() else {}
    command = f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    figures = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in figures.items()}
    common.write_json(path, results | figures | {"commit": commit, "machine": machine(), "command": command})


def print_table(rows, title=""):
    """Prints rows of equal length (the first is the heading) in columns; numbers to the right."""
    rows = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}" if title else "")
    for n, row in enumerate(rows):
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
        if n == 0:
            print("  ".join("-" * width for width in widths))


# -------------------------------------------------------------------------------------------------------------- alignment
ROWS = {"all": "all fields", "all_unseen": "  with an unseen triple", "count": "count", "colour": "colour", "shape": "shape", "relation": "relation"}


def interval(values):
    """Half-width of the 95 % interval of the mean of independent values, in their unit; nan are left out."""
    values = np.asarray(values)[~np.isnan(values)]
    return 1.96 * values.std() / max(1, len(values))**0.5


def percent(name, verdicts):
    """{name: 100 times the mean of verdicts (0 or 1) or of their differences, name_ci: half of its 95 % interval}; nan are left out."""
    return {name: 100 * float(np.nanmean(verdicts)), f"{name}_ci": 100 * float(interval(verdicts))}


def validation_prompts(data, size, samples):
    """The first `samples` validation scenes and one caption of each, the same for every run: (scenes, captions, unseen flags)."""
    from toy.shapes import Scene
    dataset = common.CaptionedImages(data, "val", size)
    if "scene" not in dataset.items[0][2]:
        raise UserError(f"--data {data}: its annotations hold no scenes, so there is nothing to grade exactly; use --data shapes")
    items = dataset.items[:samples]
    captions = [random.Random(i).choice(texts) for i, (_, texts, _) in enumerate(items)]
    return [Scene.from_json(image["scene"]) for _, _, image in items], captions, [image["unseen"] for _, _, image in items]


def alignment(painter, data, samples=2048, sampling=None, batch=256, progress=True):
    """Draws held-out captions, picture i from noise i, and has them judged.

    Returns (figures, table): figures in % are all, all_ci, all_unseen, count, colour, shape and relation, with samples; table holds for
    each the verdicts, an array of 0 and 1 with a row a caption, nan where a field does not apply (relation: scenes of one group).
    """
    scenes, captions, unseen = validation_prompts(data, painter.settings.size, samples)
    return judged(painter.draw(captions, **sampling or {}, batch=batch, progress=progress), scenes, unseen)


def judged(pictures, scenes, unseen):
    """What the exact judge says of pictures, uint8 (N, H, W, 3), each drawn for one of the scenes: see `alignment`."""
    from toy.shapes import FIELDS, judge, parse
    verdicts = [judge(things, scene) for things, scene in zip(parse(pictures), scenes)]
    table = {field: np.array([verdict[field] for verdict in verdicts], float) for field in FIELDS}
    table["relation"][[scene.relation is None for scene in scenes]] = np.nan
    table["all_unseen"] = np.where(unseen, table["all"], np.nan)
    figures = {name: 100 * float(np.nanmean(table[name])) for name in ROWS}
    return figures | percent("all", table["all"]) | {"samples": len(scenes)}, table


def alignment_rows(figures, table):
    """The figures as rows of a table, each with its interval."""
    return [["held-out captions", "right, %", "+-"], *([label, figures[name], 100 * interval(table[name])] for name, label in ROWS.items())]


def keep_halfway(painter, data, halfway):
    """A look at a training: grades a few captions, and keeps its weights as early.safetensors where they are nearest to half of them right.

    halfway: how far the weights that are kept are from 50 %, in points (inf: none are kept). Returns the percentage right and the new `halfway`.
    """
    right = alignment(painter, data, samples=128, sampling={"steps": 10}, progress=False)[0]["all"]
    if abs(right - 50) < halfway:
        halfway = abs(right - 50)
        common.save_tensors(painter.model.state_dict(), painter.folder / "early.safetensors")
    return right, halfway


def report(painter, data, samples, begin, script):
    """The end of a training: draws validation captions into samples/validation.png and, where they tell of scenes, grades `samples` of them.

    begin: time.time() at the start, script: the method's file; they are measured too. Returns the figures, which are also in results.json.
    """
    s, folder, items = painter.settings, painter.folder, common.CaptionedImages(data, "val", painter.side).items
    captions = [texts[i % len(texts)] for i, (_, texts, _) in enumerate(items[:24])]
    sample.picture_grid(painter.draw(captions), captions, folder / "samples" / "validation.png")
    print(f"captions of the validation split, drawn: {folder / 'samples' / 'validation.png'}")
    if "scene" not in items[0][2]:
        return {}
    figures, table = alignment(painter, data, samples)
    print_table(alignment_rows(figures, table), f"{folder}: {figures['samples']} held-out captions, 25 steps of {s.sampler}, guidance {s.guidance:g}")
    figures |= {"seconds": time.time() - begin, "peak_memory_mb": peak_memory_mb(), "help_seconds": help_seconds(script)}
    write_results(folder, figures)
    print(f"{figures['seconds']:.0f} s in all, {figures['peak_memory_mb']:.0f} MB at the most; figures in {folder / 'results.json'}")
    return figures


def steps_curve(painter, data, samples, sampling, folder):
    """Accuracy against the number of sampling steps for the three samplers, as a table and a picture, <folder>/steps.png."""
    numbers, curves = (5, 10, 15, 25, 50, 100), {}
    for sampler in ("ddpm", "ddim", "dpm"):
        for steps in numbers:
            figures, _ = alignment(painter, data, samples, sampling | {"sampler": sampler, "steps": steps})
            curves.setdefault(sampler, []).append((steps, figures["all"]))
    rows = [["all right, %, after", *(f"{steps} steps" for steps in numbers)]]
    rows += [[sampler, *(right for _, right in curve)] for sampler, curve in curves.items()]
    print_table(rows, f"{painter.folder}: {samples} held-out captions, +- {196 * (0.9 * 0.1 / samples)**0.5:.0f} where 90 % are right")
    sample.plot(curves, folder / "steps.png", "network evaluations a picture", "held-out captions all right, %")
    write_results(folder, {f"{sampler}_{steps}": right for sampler, curve in curves.items() for steps, right in curve})
    print(f"as a picture: {folder / 'steps.png'}")


# --------------------------------------------------------------------------------------------------------- picture quality
LABELS = {"clip_score": "CLIP score", "cmmd": "CMMD", "fid": "FID", "tiny_clip_score": "tiny-CLIP score",
          "tiny_clip_distance": "tiny-CLIP distance", "toy_inception_distance": "toy Inception distance"}


def sha256(path):
    """Of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ClipScorer:
    """A whole frozen CLIP: pictures and texts as vectors of length 1, whose product, a cosine, says how well they go together.

    path: a folder in the Hugging Face format or a name on its hub. `dim` is D. `tiny` is true of the toy world's stand-in: no published
    CLIP looks at less than 224 x 224 pixels. Works in fp32, as a measure should. Raises UserError if it cannot be loaded.
    """
    def __init__(self, path, device="cpu"):
        from transformers import CLIPImageProcessorPil
        model, self.tokenizer = common.load_pretrained("CLIPModel", path, "--clip-model", "CLIP of text and pictures", device, dtype=torch.float32)
        processor = CLIPImageProcessorPil()                                    # CLIP's own mean and deviation, if the folder names none
        with contextlib.suppress(OSError):
            processor = CLIPImageProcessorPil.from_pretrained(path)
        self.path, self.device, self.model = str(path), device, model
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        self.side, self.length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
        self.dim, self.tiny = model.config.projection_dim, self.side < 224
        # Hessel et al. begin each caption so; the tiny CLIP has never read these words, and reads 20 tokens only
        self.prefix = "" if self.tiny else "A photo depicts "

    def images(self, pictures):
        """A batch of pictures, uint8 (B, H, W, 3) -> (B, D). CLIP looks at the centre square, the shorter side brought to its own."""
        x = torch.as_tensor(pictures).to(self.device).permute(0, 3, 1, 2).float()                      # (B, 3, H, W)
        if min(x.shape[2:]) != self.side:
            size = [side * self.side // min(x.shape[2:]) for side in x.shape[2:]]
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)           # as Pillow, with which CLIP was trained
        top, left = ((side - self.side) // 2 for side in x.shape[2:])
        x = x[:, :, top:top + self.side, left:left + self.side] / 255
        return F.normalize(self.model.get_image_features(pixel_values=(x - self.mean) / self.std).pooler_output, dim=-1)

    def texts(self, texts):
        """A batch of texts, each cut at the length that CLIP reads: a list of B strings -> (B, D)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt").to(self.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output, dim=-1)

    def score(self, image, captions):
        """CLIP score (Hessel et al. 2021, arXiv 2104.08718), 2.5 max(cos, 0): image features (B, D) and B captions -> (B,)."""
        return 2.5 * (image * self.texts([self.prefix + caption for caption in captions])).sum(-1).clamp(min=0)


class Aesthetic:
    """A linear head on CLIP's picture features, in a file of tensors "weight" (1, D) and "bias" (1,): how good a picture looks (LAION's
    aesthetic predictors are of this kind). pictures uint8 (N, H, W, 3) -> (N,). Raises UserError if it does not fit the CLIP."""
    def __init__(self, path, clip):
        tensors = common.read_weights(path, f"--scorer {path}")
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {"weight": (1, clip.dim), "bias": (1,)}:
            raise UserError(f"--scorer {path} is no linear head on the features of {clip.path}: expected weight (1, {clip.dim}) and bias (1,)")
        self.clip, self.weight, self.bias = clip, tensors["weight"][0].to(clip.device), tensors["bias"].to(clip.device)

    def __call__(self, pictures, batch=256):
        return torch.cat([self.clip.images(pictures[i:i + batch]) @ self.weight + self.bias for i in range(0, len(pictures), batch)])


class Inception:
    """An Inception network in a TorchScript file of the user's, such as inception-2015-12-05.pt: uint8 pictures (B, H, W, 3) -> (B, dim).

    Such a file brings its own code, also for the resizing, so its SHA-256 is printed before anything of it runs. Raises UserError for one
    that is missing, damaged, no TorchScript or no network of pictures.
    """
    def __init__(self, path, device="cpu"):
        if not Path(path).is_file():
            raise UserError(f"--inception {path}: there is no such file")
        self.device, self.digest, wrong = device, sha256(path), "is damaged or no TorchScript file"
        print(f"inception: {path}, SHA-256 {self.digest}")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
            names, wrong = [argument.name for argument in self.network.forward.schema.arguments], "gives no features (B, D) of uint8 (B, 3, H, W)"
            self.flags = {"return_features": True} if "return_features" in names else {}
            _, self.dim = self(np.zeros((2, 64, 64, 3), np.uint8)).shape
        except (RuntimeError, ValueError, AttributeError) as error:
            raise UserError(f"--inception {path} {wrong} ({str(error).strip().splitlines()[-1][:100]})") from None

    @torch.no_grad()
    def __call__(self, pictures):
        return self.network(torch.as_tensor(pictures).to(self.device).permute(0, 3, 1, 2).contiguous(), **self.flags).float()


def parts(rows, size=1024):
    """Rows of a (memory-mapped) array in float64, a few at a time."""
    return (np.asarray(rows[i:i + size], np.float64) for i in range(0, len(rows), size))


def statistics(rows):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D)."""
    mu = sum(part.sum(0) for part in parts(rows)) / len(rows)
    return mu, sum((part - mu).T @ (part - mu) for part in parts(rows)) / (len(rows) - 1)


def frechet_distance(mu_1, sigma_1, mu_2, sigma_2):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of two Gaussians; of Inception features the FID (Heusel et al. 2017, 1706.08500).

    S_1 S_2 has the eigenvalues of the symmetric S_1^(1/2) S_2 S_1^(1/2), so eigh is enough, for singular covariances too.
    """
    values, vectors = np.linalg.eigh(sigma_1)
    root = vectors * values.clip(0)**0.5 @ vectors.T                           # clip: rounding leaves eigenvalues just below 0
    trace = (np.linalg.eigvalsh(root @ sigma_2 @ root).clip(0)**0.5).sum()
    return float(np.maximum(((mu_1 - mu_2)**2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * trace, 0))


def clip_distances(clip, data, *drawn):
    """How far drawn pictures are from real ones: for each array of them, uint8 (N, H, W, 3), the Frechet distance of what a `ClipScorer` sees in
    them to what it sees in the first N validation pictures."""
    dataset = common.CaptionedImages(data, "val", drawn[0].shape[1])
    real = torch.stack([dataset.picture(i) for i in range(len(drawn[0]))]).permute(0, 2, 3, 1)
    target, *found = (statistics(np.concatenate([clip.images(part).cpu().numpy() for part in torch.as_tensor(pictures).split(256)]))
                      for pictures in (real, *drawn))
    return [frechet_distance(*target, *some) for some in found]


def cmmd(x, y, sigma=10.0, size=1024):
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603) of CLIP features (N, D) and (M, D) of length 1: 1000 times the squared maximum mean
    discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y), k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), over all pairs as in the paper's code.

    The paper's CLIP is ViT-L/14 at 336 pixels: figures of another are not to be set beside its own.
    """
    def kernel(a, b):                                                          # mean over all pairs, by squares of size x size
        squared = ((p**2).sum(1)[:, None] + (q**2).sum(1) - 2 * p @ q.T for p, q in itertools.product(parts(a, size), parts(b, size)))
        return sum(np.exp(block / (-2 * sigma**2)).sum() for block in squared) / (len(a) * len(b))
    return float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def read_statistics(path, dim):
    """mu (dim,) and sigma (dim, dim) of an .npz file. Raises UserError if it is damaged, lacks them or has them of another size."""
    try:
        with np.load(path) as content:
            mu, sigma = (np.asarray(content[name], np.float64) for name in ("mu", "sigma"))
    except KeyError:
        raise UserError(f"--reference {path} holds no mu and sigma: give statistics of Inception features, or a folder of pictures") from None
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--reference {path} cannot be read as an .npz file ({str(error).strip().splitlines()[0][:100]})") from None
    if mu.shape != (dim,) or sigma.shape != (dim, dim) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise UserError(f"--reference {path} has mu {mu.shape} and sigma {sigma.shape}; this --inception needs finite ({dim},) and ({dim}, {dim})")
    return mu, sigma


class Pictures(common.CaptionedImages):
    """All pictures of a folder, with captions or without."""
    def __init__(self, root, size):
        self.items = [(path, [""], {}) for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in common.PICTURES]
        self.size, self.cache = size, None
        if not self.items:
            raise UserError(f"--reference {root} is neither a folder with pictures nor an .npz file")


def quality(painter, data, weights, folder, samples=None, clip_model=None, inception=None, reference=None, sampling=None, batch=128):
    """Draws validation captions, picture i from noise i, and measures the pictures with CLIP and, where given, Inception; returns the figures.

    weights: the file the painter was loaded from; folder: gets quality/, the features, with which a second start goes on; samples: default
    30 000, or all captions if they are fewer; clip_model: default the run's own; inception: a TorchScript file; reference: a folder of
    pictures or an .npz of mu and sigma, default the validation pictures; of pictures the centre square, as large as the drawn ones.
    The figures bear the names of what they are: clip_score (against the drawn caption), cmmd and fid; with the tiny CLIP tiny_clip_score and
    tiny_clip_distance; of toy pictures toy_inception_distance. _ci: half of the 95 % interval; _real: of the validation pictures.
    """
    dataset, folder = common.CaptionedImages(data, "val", painter.side), Path(folder) / "quality"
    samples, statistics_only = samples or min(30_000, len(dataset)), str(reference).endswith(".npz")
    pictures = Pictures(reference, painter.side) if reference and not statistics_only else dataset
    if min(samples, len(pictures)) < 2:
        raise UserError(f"{samples} drawn and {len(pictures)} real pictures are too few, a distance needs 2 of either: see --samples, --reference")
    if statistics_only and not inception:
        raise UserError(f"--reference {reference} serves a distance of Inception features: add --inception FILE, or give a folder of pictures")
    clip = ClipScorer(clip_model or painter.settings.clip, painter.device)
    network = Inception(inception, painter.device) if inception else None
    target = read_statistics(reference, network.dim) if statistics_only else None                     # refused before anything is drawn
    captions = [random.Random(i).choice(dataset.items[i % len(dataset)][1]) for i in range(samples)]

    def measure(pictures, captions):                                           # columns: CLIP features, CLIP score, Inception features
        image = clip.images(pictures)
        return torch.cat([image, clip.score(image, captions)[:, None], *([network(pictures)] if network else [])], dim=1).cpu().numpy()

    def drawn(note):
        for start in range(note["done"], samples, batch):
            some = captions[start:start + batch]
            yield measure(painter.draw(some, **sampling or {}, first=start, batch=batch), some)

    def real(note):
        places, broken = [(i, i) for i in range(note["done"], len(pictures))], common.BrokenPictures(len(pictures))  # (i, i): with caption i of above
        workers = min(8, os.cpu_count() or 1) if len(pictures) > 5000 else 0
        for some, texts, unread in torch.utils.data.DataLoader(pictures, batch, sampler=places, collate_fn=common.collate, num_workers=workers):
            broken.add(unread, some)
            yield measure(some.permute(0, 2, 3, 1), texts)

    def digest(lines):
        return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()
    files = [clip.path, *(sha256(path) for path in Path(clip.path).glob("*.safetensors"))]
    models, width = {"CLIP": files, "Inception": network and network.digest, "batch": batch}, clip.dim + 1 + (network.dim if network else 0)

    def features(name, made_from, count, stream):                              # of `count` pictures, (count, width)
        made_from = models | made_from | {"shape": [count, width]}
        return common.collect(folder / f"{name}.npy", made_from, (count, width), np.float32, stream, name)[0]
    made_from = {"weights": sha256(weights), "captions": digest(captions), "sampling": str(sampling),
                 "precision": f"{painter.precision}, {painter.device}"}
    rows = features("drawn", made_from, samples, drawn)
    score, distance = ("tiny_clip_score", "tiny_clip_distance") if clip.tiny else ("clip_score", "cmmd")
    scores = np.array(rows[:, clip.dim], float)
    figures = {score: float(scores.mean()), f"{score}_ci": float(interval(scores)), "quality_samples": samples}
    if not statistics_only:
        listed = digest((path.stat().st_size, path, *texts) for path, texts, _ in pictures.items)
        others = features("reference", {"pictures": listed, "side": painter.side}, len(pictures), real)
        figures |= {f"{score}_real": float(others[:, clip.dim].mean(dtype=float))} if pictures is dataset else {}
        figures[distance] = cmmd(rows[:, :clip.dim], others[:, :clip.dim])
        if network:
            target = statistics(others[:, clip.dim + 1:])
            np.savez(folder / "reference.npz", mu=target[0], sigma=target[1])  # for another run's --reference
    if network:
        distance = "toy_inception_distance" if "scene" in dataset.items[0][2] else "fid"
        figures[distance] = frechet_distance(*statistics(rows[:, clip.dim + 1:]), *target)
    if statistics_only:
        print(f"no distance of CLIP features, and no real pictures' score: {reference} holds statistics of Inception features only")
    if samples < 10_000:
        print("distances of few pictures come out too high: compare them with those of as many only")
    return figures


def quality_rows(figures):
    """The figures as rows of a table."""
    cells = {name: [f"{figures[key]:.4f}" if key in figures else "" for key in (name, f"{name}_ci", f"{name}_real")] for name in LABELS}
    return [["", "drawn", "+-", "real"], *([label, *cells[name]] for name, label in LABELS.items() if name in figures)]


# ------------------------------------------------------------------------------------------ matching of pictures and texts
def read_groups(path):
    """The groups of candidates in a file with a JSON object a line; the paths of its pictures are relative to it.

    {"pictures": ["a.jpg"], "texts": ["a dog", "a cat"], "right": 0}: of one picture and several texts, or several pictures and one text, number
    "right" is right. RefCOCOg: ten texts; VQA: "question answer" a text. Of two pictures and two texts without "right" each picture goes with
    the text of its place, as in Winoground. "kind", if there is one, names the row of the table.
    """
    groups = []
    for n, group in enumerate(common.read_json_lines(path, f"{path}", ()), 1):
        try:
            pictures, texts, right = group["pictures"], group["texts"], group.get("right")
            sizes = len(pictures), len(texts)
            fits = sizes == (2, 2) if right is None else 1 in sizes and 0 <= right < max(sizes) and max(sizes) > 1
            if not (fits and type(pictures) is type(texts) is list and all(isinstance(word, str) for word in pictures + texts)):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f'{path}, line {n}: expected {{"pictures": [...], "texts": [...], "right": number}}, one of the lists of length 1, '
                            f"or two of each without right; found {json.dumps(group)[:80]}") from None
        groups.append(group | {"pictures": [os.path.normpath(Path(path).parent / picture) for picture in pictures]})
    return groups


def read_comvg(path, pictures):
    """ComVG: a text with a right and a wrong picture, from its CSV; the pictures are <id>.jpg (or .png) in a folder."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        files = {picture.stem: picture for picture in Path(pictures).iterdir() if picture.suffix.lower() in common.PICTURES}
        rng, groups = random.Random(0), []
        for row in rows:
            order = rng.sample(("pos", "neg"), 2)
            groups.append({"pictures": [str(files[row[f"{side}_image_id"].split(".")[0]]) for side in order], "texts": [row["sentence"]],
                           "right": order.index("pos"), "kind": changed_part(row["pos_triplet"], row["neg_triplet"])})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--comvg {path}, --pictures {pictures} cannot be read ({error})") from None
    except (KeyError, AttributeError) as error:
        raise UserError(f"--comvg {path}: {error} is neither a column of it nor a picture in {pictures}/ (columns: id, sentence, pos_triplet, "
                        "neg_triplet, pos_image_id, neg_image_id, neg_value)") from None
    return groups


def changed_part(right, wrong):
    """Which of subject, verb and object differs between two triplets, "a,b,c" each."""
    parts = zip(("subject", "verb", "object"), *([part.strip() for part in re.split(r"[,;]", triplet)] for triplet in (right, wrong)))
    return next((name for name, a, b in parts if a != b), "other")


def rank(values, right):
    """1 if number `right` of the values is above all others; a tie, or nan, is never won."""
    return 1 + int((~(values[right] > np.delete(values, right))).sum())


def verdicts(groups, tables):
    """{(kind, measure): array of 0 and 1}; measures: "R@1" and, of more than five candidates, "R@5"; of two and two "text", "image" and "group"."""
    found = {}
    for group, table in zip(groups, tables):
        if "right" in group:
            place = rank(table.ravel(), group["right"])
            said = {f"R@{k}": place <= k for k in (1, 5) if k < table.size}
        else:                                                                 # table: (picture, text)
            said = {"text": table[0, 0] > table[0, 1] and table[1, 1] > table[1, 0], "image": table[0, 0] > table[1, 0] and table[1, 1] > table[0, 1]}
            said["group"] = said["text"] and said["image"]
        for measure, right in said.items():
            found.setdefault((group.get("kind", ""), measure), []).append(right)
    return {name: np.array(values, float) for name, values in found.items()}


def recalls(table, owner):
    """Of scores (pictures, texts), text j being of picture owner[j]: "text_R@1" and so on in %, texts found for pictures, and "picture_R@1", back."""
    owner, figures = np.asarray(owner), {}
    texts = [1 + int((~(row[owner == i].max() > row[owner != i])).sum()) for i, row in enumerate(table)]
    pictures = [rank(table[:, j], i) for j, i in enumerate(owner)]
    for name, ranks in (("text", texts), ("picture", pictures)):
        figures |= {f"{name}_R@{k}": 100 * float((np.array(ranks) <= k).mean()) for k in (1, 5, 10)}
    return figures


@torch.no_grad()
def clip_scores(clip, pictures, texts, pairs, batch=256):
    """Cosines (M,) by a `ClipScorer` of pairs (M, 2) of a picture, of uint8 (P, 3, H, W), and a text."""
    image = torch.cat([clip.images(some.permute(0, 2, 3, 1)) for some in pictures.split(batch)])
    text = torch.cat([clip.texts(texts[i:i + batch]) for i in range(0, len(texts), batch)])
    return (image[pairs[:, 0]] * text[pairs[:, 1]]).sum(-1).cpu()


def tune_clip(clip, pictures, texts, groups, steps=150, batch=64, lr=1e-4):
    """A CLIP tuned, all of it, on labelled groups by its own loss: each picture against all texts of a batch, which costs a CLIP nothing.

    groups: [(right pair of a picture and a text, [wrong pairs], ...)]. On other pictures of the training split this was the best of what was
    tried: the hinge loss and LoRA, learning rates of 3e-5 to 4e-3, 200 or 500 steps.
    """
    clip = copy.copy(clip)
    clip.model = copy.deepcopy(clip.model).requires_grad_(True)
    optimizer, rng = torch.optim.AdamW(clip.model.parameters(), lr=lr), random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        some = rng.sample(groups, min(batch, len(groups)))
        numbers = sorted({text for right, wrong, *_ in some for _, text in (right, *wrong)})
        shown = pictures[[right[0] for right, *_ in some]].permute(0, 2, 3, 1)
        logits = 50 * clip.images(shown) @ clip.texts([texts[i] for i in numbers]).T
        loss = F.cross_entropy(logits, torch.tensor([numbers.index(right[1]) for right, *_ in some], device=logits.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip.model.requires_grad_(False)
    return clip


# -------------------------------------------------------------------------------------------------------------------- cost
def help_seconds(script):
    """How long `--help` of a script takes."""
    begin = time.time()
    subprocess.run([sys.executable, script, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.time() - begin


def forward_flops(settings):
    """Floating-point operations of one forward pass at batch 1, a multiply-add counted as two."""
    from torch.utils.flop_counter import FlopCounterMode
    model, (x, t, text, mask) = uvit_fusion.UViT(settings), random_inputs(settings, 1, "cpu")
    # the fused kernel is not counted on CPUs; in bf16 the network takes the plain softmax there
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x, t, text, mask)
    return counter.get_total_flops()


def random_inputs(s, batch, device):
    g = torch.Generator().manual_seed(0)
    text, lengths = torch.randn(batch, s.text_length, s.text_dim, generator=g), torch.randint(8, s.text_length, (batch, 1), generator=g)
    inputs = (torch.randn(batch, s.channels, s.size, s.size, generator=g), torch.randint(1, 1001, (batch,), generator=g), text,
              torch.arange(s.text_length) < lengths)
    return [value.to(device) for value in inputs]


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """While it is entered, adds up the `seconds` that matrix products take on a CPU, backward included."""
    seconds = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        begin = time.perf_counter()
        result = function(*args, **kwargs or {})
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.seconds += time.perf_counter() - begin
        return result


def step_costs(variants, device, precision, batch=None, rounds=10, compiled=False):
    """What a training step and a drawn picture cost: {name: {parameters, gflops, ms, sample_ms, batch, peak, products}}.

    variants: {name: Settings}. A step is forward, backward and optimiser on random inputs, text encoder not included. The variants take
    turns and the median over `rounds` counts, so that a passing load hits all alike; so does the matrix-product peak (operations a second)
    that is measured among them. sample_ms: a picture in 20 guided steps; products: on a CPU, the share of a step, not compiled, that matrix
    products take (in fp32 without those of attention, which are inside the fused kernel).
    """
    def step(network, model, optimizers, x, *more):
        with common.autocast(device, precision):
            loss = (network(x, *more).float() - x).square().mean()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        common.synchronize(device)
    costs, runs, peaks = {}, {}, []
    for name, s in variants.items():
        torch.manual_seed(0)
        model, size = uvit_fusion.UViT(s).to(device), batch or s.batch
        costs[name] = {"parameters": sum(p.numel() for p in model.parameters()), "gflops": forward_flops(s) / 1e9, "batch": size}
        few, network = random_inputs(s, max(1, size // 8), device), torch.compile(model) if compiled else model
        runs[name] = (model, network, uvit_fusion.make_optimizers(model, s), random_inputs(s, size, device), few, [], [])
    for n in range(rounds + 2):
        if n % 4 == 2:
            peaks.append(common.matmul_rate(device, precision, 4096))
        for name, (model, network, optimizers, (x, t, text, mask), few, times, draws) in runs.items():
            common.synchronize(device)
            begin = time.perf_counter()
            step(network, model, optimizers, x, t, text, mask)
            times.append(time.perf_counter() - begin)
            if n % 4 == 2:
                s, (x, t, text, mask) = variants[name], few
                begin = time.perf_counter()
                with torch.no_grad(), common.autocast(device, precision):
                    guided = uvit_fusion.guided(model, text, mask, text[:1], mask[:1], 3.0)
                    uvit_fusion.Diffusion(s.schedule, s.target).sample(guided, x, 20)
                common.synchronize(device)
                draws.append((time.perf_counter() - begin) / len(x))
    for name, (model, _, optimizers, inputs, _, times, draws) in runs.items():
        if device.type == "cpu":
            begin = time.perf_counter()
            with Products() as products:
                step(model, model, optimizers, *inputs)                                                 # compiled code would hide its products
            costs[name]["products"] = products.seconds / (time.perf_counter() - begin)
        costs[name] |= {"ms": 1e3 * float(np.median(times[2:])), "sample_ms": 1e3 * float(np.median(draws)), "peak": float(np.median(peaks))}
    return costs


def photographs(folder, count=16):
    """Stand-ins for photographs: JPEGs of 640 x 480 with structure of all sizes and noise, some 100 kB each, with a caption beside each."""
    rng = np.random.default_rng(0)
    for i in range(count):
        layers = [Image.fromarray(rng.integers(0, 255, (n * 3, n * 4, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
                  for n in (2, 8, 40, 160)]
        Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text(f"picture {i}\n")


def load_plainly(path, size):
    """What `common.load_picture` is measured against."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS))


def loader_costs(batch, step_ms):
    """How much faster the loader reads photographs than `load_plainly`, and what share of a step of `step_ms` fetching a batch of latents takes."""
    from autoencoder import Autoencoder, Latents
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photographs(folder)
        paths = sorted(folder.glob("*.jpg"))
        for size in (256, 64):
            times = {load_plainly: [], common.load_picture: []}
            for load in [*times] * 8:
                begin = time.perf_counter()
                for path in paths:
                    load(path, size)
                times[load].append((time.perf_counter() - begin) / len(paths))
            plain, ours = (min(values) for values in times.values())              # a passing load can only make a time longer
            figures[f"loader_speedup_{size}"] = plain / ours
            print(f"loader, one process, 640 x 480 JPEGs to {size} px: {1 / ours:.0f} pictures a second, plainly {1 / plain:.0f}: "
                  f"{plain / ours:.2f} x")
        small = Autoencoder(32, (1, 1, 1, 1), 1).eval()                            # its latents are as large as those of the real one
        latents = Latents(folder, "train", 256, small, "random", folder / "latents")
        begin = time.perf_counter()
        for _ in common.batches(latents, batch, 0, 50, seed=0):
            pass
        fetch = 1e3 * (time.perf_counter() - begin) / 50
    figures["data_share_percent"] = 100 * fetch / (fetch + step_ms)
    print(f"fetching {batch} latents and captions: {fetch:.1f} ms, {figures['data_share_percent']:.2f} % of a training step")
    return figures


def cost(device, precision, batch, compiled=False, folder="runs/cost"):
    """Early against intermediate fusion at both sizes, a table over v and c at the paper's size, and the loader."""
    figures, gpu = {}, "gpu_" if device.type == "cuda" else ""
    for preset, v, c, prefix in (("toy", 2, 2, "toy_"), ("coco", 5, 1, "")):
        base = uvit_fusion.Settings(**uvit_fusion.PRESETS[preset])
        size = base.batch if preset == "toy" or gpu else batch
        sweep = {"early": (0, 0, "concat"), "intermediate": (v, c, "concat")}
        if preset == "coco":
            sweep |= {f"v{v} c{c}": (v, c, "concat") for v, c in ((3, 3), (4, 1), (6, 2))}
            sweep |= {"cross, early": (0, 0, "cross"), "cross, v3 c3": (3, 3, "cross"), "cross, v3 c1": (3, 1, "cross")}
        variants = {name: dataclasses.replace(base, image_blocks=v, caption_blocks=c, fusion=f) for name, (v, c, f) in sweep.items()}
        costs = step_costs(variants, device, precision, size, rounds=40 if preset == "toy" else 8, compiled=compiled)
        early = costs["early"]
        rows = [["", "v", "c", "M parameters", "GFLOPs", "saved, %", "ms a step", "speed-up", "% of peak", "products, %", "ms a picture"]]
        for name, got in costs.items():
            saved, faster = 100 * (1 - got["gflops"] / early["gflops"]), early["ms"] / got["ms"]
            mfu = 100 * 3 * got["gflops"] * 1e9 * size / (got["ms"] / 1e3) / got["peak"]               # backward costs twice a forward
            rows.append([name, *sweep[name][:2], f"{got['parameters'] / 1e6:.2f}", f"{got['gflops']:.3f}", saved, got["ms"], f"{faster:.2f}",
                         mfu, 100 * got["products"] if "products" in got else "", got["sample_ms"]])
            if name in ("early", "intermediate"):
                figures |= {f"{gpu}{prefix}{name}_{what}": got[what] for what in ("gflops", "ms", "sample_ms")}
            if name == "intermediate":
                figures |= {f"{gpu}{prefix}v": v, f"{gpu}{prefix}c": c, f"{gpu}{prefix}flops_saved_percent": saved,
                            f"{gpu}{prefix}step_speedup": faster, f"{gpu}{prefix}mfu_percent": mfu}
                figures |= {f"{prefix}products_percent": 100 * got["products"]} if "products" in got else {}
        print_table(rows, f"preset {preset}, training batch {size}; a picture: 20 guided steps; matrix-product peak of {machine()} in "
                          f"{str(precision)[6:]}: {early['peak'] / 1e12:.2f} TFLOP/s")
    figures |= {f"{gpu}{name}": value for name, value in loader_costs(size, costs["intermediate"]["ms"]).items()}
    if gpu:
        figures |= {"gpu_pictures_per_second": 1e3 / costs["intermediate"]["sample_ms"], "gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_results(folder, figures)


# ----------------------------------------------------------------------------------------------------- the paper's comparison
T_95 = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}     # Student's t, 97.5 %, for the mean of so many values: an interval has two ends
T_BOUND = {1: math.nan, 2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132}   # 95 %, for a bound on one side


VARIANTS = {
    "early": dict(fusion="concat", image_blocks=0, caption_blocks=0),
    "intermediate": dict(fusion="concat"),
    "early_cross": dict(fusion="cross", image_blocks=0, caption_blocks=0),
    "intermediate_cross": dict(fusion="cross"),
}


def compare(s, data, folder, ranks, precision, options, seeds, samples, variants=tuple(VARIANTS)):
    """The paper's experiment in small: the variants, same data, steps and seeds (cross-attention: one seed), one table, one picture.

    variants: names of VARIANTS, "early" and "intermediate" among them. A run that is graded is kept and an interrupted one goes on, so the
    command can be given again; with options.overwrite all begin anew. Intervals are over seeds.
    """
    validation_prompts(data, s.size, 1)                              # refuses data that cannot be graded before anything is trained
    folder, right, painters = Path(folder), {name: [] for name in VARIANTS if name in variants}, {}
    for seed, name in itertools.product(range(seeds), right):
        change = VARIANTS[name]
        if seed and change["fusion"] == "cross":
            continue
        run, settings = folder / f"{name}-{seed}", dataclasses.replace(s, seed=seed, **change)
        verdict = run / "compared.json"                              # not results.json, which eval.py writes with any flags
        if verdict.exists() and not options.overwrite:
            common.check_settings(run, settings)
        else:
            print(f"\n{name}, seed {seed}: into {run}/")
            painter = uvit_fusion.train(settings, data, run, ranks, precision, common.pick_up(options, run))
            figures, table = alignment(painter, data, samples, {"interval": (0.0, 1.0), "sampler": "dpm"})
            print_table(alignment_rows(figures, table))
            write_results(run, figures)
            common.write_json(verdict, figures)
        right[name].append(common.read_json(verdict))
        if not seed:
            painters[name] = uvit_fusion.load(run, ranks.device, precision)

    def mean_and_interval(values):
        spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
        return float(np.mean(values)), float(T_95[min(len(values), 5)] * spread / len(values)**0.5)
    cost = step_costs({name: painter.settings for name, painter in painters.items()}, ranks.device, precision)
    rows, figures = [["", "all right, %", "+-", "unseen", "count", "relation", "GFLOPs", "ms a step", "seeds"]], {}
    for name, runs in right.items():
        mean, half = mean_and_interval([run["all"] for run in runs])
        figures |= {f"{name}_all": mean, f"{name}_all_ci": half, f"{name}_gflops": cost[name]["gflops"], f"{name}_ms": cost[name]["ms"]}
        rows.append([name, mean, half, *(np.mean([run[f] for run in runs]) for f in ("all_unseen", "count", "relation")),
                     f"{cost[name]['gflops']:.3f}", cost[name]["ms"], len(runs)])
    print_table(rows, f"Fusion variants after {s.steps} steps, {right['early'][0]['samples']} held-out captions each; intervals over seeds")
    difference = [b["all"] - a["all"] for a, b in zip(right["early"], right["intermediate"])]
    figures["difference"], figures["difference_ci"] = mean_and_interval(difference)
    n = min(len(difference), 5)                                      # more seeds: bounds a little wide
    figures["difference_bound"] = figures["difference"] - figures["difference_ci"] * T_BOUND[n] / T_95[n]
    print(f"intermediate - early, concatenation: {figures['difference']:+.1f} +- {figures['difference_ci']:.1f} points over {len(difference)} seeds; "
          f"with 95 % confidence at least {figures['difference_bound']:+.1f}")
    write_results(folder, {name: value for name, value in figures.items() if not math.isnan(value)})
    scenes, captions, _ = validation_prompts(data, s.size, 8)
    pictures = np.concatenate([painter.draw(captions) for painter in painters.values()])
    texts = [""] * len(captions) * (len(painters) - 1) + captions
    sample.picture_grid(pictures, texts, folder / "samples" / "variants.png", columns=len(captions), titles=list(painters))
    print(f"the same captions and noise, a row a variant: {folder / 'samples' / 'variants.png'}")


# --------------------------------------------------------------------------------------------- rank of text-to-image attention
def effective_rank(matrices):
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): (..., Q, K) -> (...), from 1 to min(Q, K)."""
    values = torch.linalg.svdvals(matrices.cpu().double())                     # some GPUs have no float64
    p = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return (-(p * p.clamp(min=1e-12).log()).sum(-1)).exp()


@torch.no_grad()
def analyse(painter, data, folder, samples=64):
    """The attention of image tokens to text tokens, block by block: its effective rank and its share of all attention.

    Rows of the matrix A (N, L) of a head are patches, columns the caption's real tokens, entries the softmax over all keys. Averaged
    over heads, validation pictures and five noise levels. A rank of 1 means that every patch looks at the caption in the same way.
    The measure is this project's own: the paper's code for its analysis was not released.
    """
    s, model, device = painter.settings, painter.model, painter.device
    dataset = painter.data(data, "val")
    pictures = torch.stack([dataset.picture(i) for i in range(min(samples, len(dataset)))])
    text, mask = painter.encoder([texts[0] for _, texts, _ in dataset.items[:len(pictures)]])
    noise = torch.randn(len(pictures), s.channels, s.size, s.size, generator=torch.Generator().manual_seed(0)).to(device)
    x_0, patches = painter.to_x_0(pictures, noise), (s.size // s.patch)**2
    names = [*(f"in {i}" for i in range(s.depth // 2)), "middle", *(f"out {i}" for i in range(s.depth // 2))]
    ranks, shares = {name: [] for name in names}, {name: [] for name in names}
    for t in (100, 300, 500, 700, 900):
        record = []
        step = torch.full((len(x_0),), t, device=device)
        eps = torch.randn(x_0.shape, generator=torch.Generator(device).manual_seed(t), device=device)
        model(painter.diffusion.q_sample(x_0, step, eps), step, text, mask, record)
        for name, (logits, _, _) in zip(names, record):
            keys = logits.shape[-1]
            if keys == 1 + patches:
                continue                                                       # a block without text
            first = 1 + patches if s.fusion == "cross" else 1                  # where text begins among the keys
            a = logits.softmax(-1)[:, :, -patches:, first:first + s.text_length]                                   # (B, H, N, L)
            ranks[name].append([effective_rank(a[i, :, :, :real]).mean().item() for i, real in enumerate(mask.sum(1).tolist())])
            shares[name].append(a.sum(-1).mean().item())
    rows = [["block", "effective rank", "+-", "share of attention, %"]]
    for name in names:
        if ranks[name]:                                                        # the interval is over pictures, each averaged over noise levels
            rows.append([name, f"{np.mean(ranks[name]):.2f}", f"{interval(np.mean(ranks[name], 0)):.2f}", 100 * np.mean(shares[name])])
        else:
            rows.append([name, "no text", "", ""])
    print_table(rows, f"Text-to-image attention of {painter.settings.fusion}, v = {s.image_blocks}, c = {s.caption_blocks}; "
                f"the rank could be {mask.sum(1).float().mean():.1f}, the mean number of tokens")
    curve = [(i, float(np.mean(ranks[name]))) for i, name in enumerate(names) if ranks[name]]
    share = [(i, 10 * float(np.mean(shares[name]))) for i, name in enumerate(names) if shares[name]]
    write_results(folder, {f"rank_{name.replace(' ', '_')}": float(np.mean(ranks[name])) for name in names if ranks[name]})
    sample.plot({"effective rank": curve, "share of attention x 10": share}, folder / "attention_rank.png", "block", "text-to-image attention")
    print(f"as a picture: {folder / 'attention_rank.png'}")


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sample.add_run_flags(parser)
    parser.add_argument("--data", help="data to take the captions from (default: what the run was trained on)")
    parser.add_argument("--samples", type=common.positive,
                        help="captions to draw and grade (default 2048; --quality: 30 000, or all held-out captions if they are fewer)")
    parser.add_argument("--steps-curve", action="store_true", help="accuracy against sampling steps for the three samplers, instead (512 samples)")
    parser.add_argument("--cost", action="store_true", help="measure what early and intermediate fusion cost, instead")
    parser.add_argument("--batch", type=common.positive, default=32, help="--cost: training batch at the size coco on a CPU (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="--cost: torch.compile (needs a C++ compiler on CPUs)")
    looks = parser.add_argument_group("picture quality")
    looks.add_argument("--quality", action="store_true", help="measure CLIP score, CMMD and FID, instead; interrupted, it goes on at a second start")
    looks.add_argument("--clip-model", help="CLIP to measure with: a folder or a name on the hub (default: the one whose text the run reads)")
    looks.add_argument("--inception", help="TorchScript file such as inception-2015-12-05.pt, for FID; it brings code that is run: know its source")
    looks.add_argument("--reference", help="what to compare with: folder of pictures, or .npz of mu and sigma (default: the validation pictures)")
    looks.add_argument("--out", help="folder of results.json and quality/, the features (default: the run's; of a weights file: one beside it)")
    sample.add_sampling_flags(parser)
    args = parser.parse_args()
    if args.cost:
        device = common.pick_device(args.device)
        cost(device, common.pick_precision(args.precision, device), args.batch, args.compile)
        return
    painter = sample.load_painter(args)
    data = toy.prepare(args.data or painter.settings.data, painter.settings.clip, painter.side)
    if args.steps_curve:
        steps_curve(painter, data, args.samples or 512, sample.sampling(args), painter.folder)
        return
    used = painter.settings
    how = f"{args.sample_steps} steps of {args.sampler or used.sampler}, guidance {used.guidance if args.guidance is None else args.guidance:g}"
    if args.quality:
        weights = Path(args.weights or args.run)
        folder = Path(args.out or (painter.folder if args.weights or weights.is_dir() else weights.with_suffix("")))
        weights = weights / "model.safetensors" if weights.is_dir() else weights
        figures = quality(painter, data, weights, folder, args.samples, args.clip_model, args.inception, args.reference, sample.sampling(args))
        print_table(quality_rows(figures), f"{weights}: {figures['quality_samples']:,} pictures, {how}; against {args.reference or data}; "
                                           f"CLIP: {args.clip_model or painter.settings.clip}")
        write_results(folder, figures)
        return
    figures, table = alignment(painter, data, args.samples or 2048, sample.sampling(args))
    print_table(alignment_rows(figures, table), f"{args.weights or args.run}: {figures['samples']} held-out captions, {how}")
    if not args.weights and Path(args.run).suffix != ".safetensors":
        write_results(args.run, figures)


if __name__ == "__main__":
    common.entry(main)
