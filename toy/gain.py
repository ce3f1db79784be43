"""What a model gains and loses by being tuned, on the toy world: the share of held-out captions
that it gets right, the distance from real images, and how varied the images of one caption are.

`pipeline` is a `uvit_fusion.Pipeline`, `clip` an `encoders.ClipScorer`.
"""
import random

import numpy as np
import torch

import common
import encoders
import image_data
from toy import judge, shapes

CAPTIONS = 64                    # held-out captions that diversity is measured on
EACH = 8                         # images of each of them


def diversity(images, clip, each=EACH):
    """How far apart the images of a caption are: {"diversity", "clip_diversity": (captions,)}.

    images: uint8 (captions x each, H, W, 3), those of a caption in succession. Both are means over
    pairs. The first is the root mean square distance of pixels in [0, 1], and sees where things
    are. The second, 1 - cos of CLIP's features, sees wrong images among right ones.
    """
    pixels = torch.from_numpy(images).flatten(1).float() / 255
    pixels = pixels.unflatten(0, (-1, each))                                # (captions, each, HW3)
    features = clip.images(images).unflatten(0, (-1, each))                 # (captions, each, D)
    exact = "donot_use_mm_for_euclid_dist"                   # so equal images are at distance 0
    distances = torch.cdist(pixels, pixels, compute_mode=exact) / pixels.shape[-1]**0.5
    cosines = features @ features.mT                                        # (captions, each, each)
    correction = each / (each - 1)           # the means count each image with itself, at distance 0
    return {"diversity": distances.mean((1, 2)).numpy() * correction,
            "clip_diversity": (1 - cosines).mean((1, 2)).cpu().numpy() * correction}


def rendered_diversity(pipeline, data):
    """The diversity of rendered images of the held-out captions, to compare with."""
    rng = random.Random(5)
    images = []
    for scene in judge.validation_scenes(data, CAPTIONS)[0]:
        for _ in range(EACH):
            images.append(shapes.render(shapes.layout(scene, rng), pipeline.image_size, rng))
    clip = encoders.ClipScorer(pipeline.cfg.clip, pipeline.device)
    return diversity(np.stack(images), clip)


def clip_distance(images, data, clip, first=0):
    """The Frechet distance between CLIP's features of N images and of N real validation images."""
    dataset = image_data.CaptionedImages(data, "val", images.shape[1])
    real = torch.stack([dataset.image(first + i) for i in range(len(images))]).permute(0, 2, 3, 1)
    return common.frechet_distance(clip.images(real).cpu(), clip.images(images).cpu())


def measure(pipeline, data, samples, rewards=None, first=0, **sampling):
    """Figures of what a pipeline generates for `samples` held-out captions, from `first` on.

    "right": the judge's verdicts (N,); the mean of each reward; "distance"; "diversity" and
    "clip_diversity" (captions,). rewards: a `fine_rewards.Rewards`; sampling: for
    `pipeline.generate`.
    """
    scenes, captions, unseen = judge.validation_scenes(data, samples, first)
    images = pipeline.generate(captions, progress=True, **sampling)
    figures = {"right": judge.grade_images(images, scenes, unseen)["all"]}
    if rewards:
        for name, values in rewards(images, captions).items():
            figures[name] = float(values.mean())
    clip = encoders.ClipScorer(pipeline.cfg.clip, pipeline.device)
    figures["distance"] = clip_distance(images, data, clip, first)
    repeated = [caption for caption in captions[:CAPTIONS] for _ in range(EACH)]
    return figures | diversity(pipeline.generate(repeated, seed=5, **sampling), clip)


def variety_lost(start, final):
    """By how much the diversity of pixels fell, in %, with an interval over captions."""
    ratio = (start["diversity"] - final["diversity"]) / start["diversity"].mean()
    return common.percent("variety_lost_percent", ratio)


def report(progress, own, rendered, folder):
    """Prints what training has gained, and draws it as rewards.png. Returns the figures.

    progress: figures of `measure`, before the first round and after each; own: verdicts on the base
    with its own guidance, not that of the tuned model; rendered: from `rendered_diversity`.
    """
    start = progress[0]
    final = progress[-1]
    rounds = [f"round {n}" for n in range(1, len(progress))]
    rows = [["held-out captions", "start", *rounds, "rendered"]]
    figures = {}
    curves = {}
    for name in start:
        values = [float(np.mean(measured[name])) for measured in progress]
        cells = [f"{value:.4f}" for value in values]
        rows.append([name, *cells, f"{rendered[name].mean():.4f}" if name in rendered else ""])
        if name in ("distance", "diversity", "clip_diversity"):
            figures[f"{name}_start"] = values[0]
            figures[f"{name}_final"] = values[-1]
        else:
            curves[name] = list(enumerate(values))
    for name, values in rendered.items():
        figures[f"{name}_real"] = float(values.mean())
    common.print_table(rows, f"{folder}: {len(start['right'])} held-out captions")
    common.plot(curves, folder / "rewards.png", "round",
                "held-out captions: share judged right, mean rewards")
    shares = common.percent("start", start["right"])
    shares |= common.percent("start_own", own)
    shares |= common.percent("final", final["right"])
    shares |= common.percent("gain", final["right"] - start["right"])
    shares |= variety_lost(start, final)
    labels = {"start": "right at the start", "start_own": "right with the base's own guidance",
              "final": "right at the end", "gain": "gained, points",
              "variety_lost_percent": "variety lost"}
    rows = [["", "%", "+-"]]
    rows += [[label, shares[name], shares[f"{name}_ci"]] for name, label in labels.items()]
    common.print_table(rows, "with 95 % intervals over captions")
    return figures | shares


# ------------------------------------------------------------------------- a round of candidates
def report_round(n, scores, kept, best):
    """Prints mean rewards of round n, from 0, of all candidates and of those learned from."""
    rows = [["mean reward", "all candidates", "learned from"]]
    for name, values in scores.items():
        rows.append([name, f"{values.mean():.3f}", f"{values[kept, best].mean():.3f}"])
    common.print_table(rows, f"round {n + 1}: {len(kept)} images to learn from")


def outline(image, masks, scale):
    """An image, `scale` times as large, with the border of each mask in black."""
    image = image.repeat(scale, 0).repeat(scale, 1)
    for mask in masks:
        mask = np.pad(mask.repeat(scale, 0).repeat(scale, 1), 1)
        inner = mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
        image[mask[1:-1, 1:-1] & ~inner] = 0
    return image


def draw_candidates(rewards, candidates, scores, totals, prompts, path, rows=4):
    """A grid of candidates, a row a prompt, with caption, parts and rewards.

    totals: sums of ranks (P, K); the smallest is on the left.
    """
    images = []
    texts = []
    scale = max(1, 96 // candidates.shape[2])
    for i in range(min(rows, len(prompts))):
        order = totals[i].argsort(kind="stable")
        ranked = candidates[i, order]                                              # (K, H, W, 3)
        captions = rewards.captioner(ranked) if "caption" in scores else [""] * len(ranked)
        parts = rewards.segmenter(ranked) if "sam" in scores else [[]] * len(ranked)
        for place, k in enumerate(order):
            images.append(outline(ranked[place], [mask for _, mask in parts[place]], scale))
            values = ", ".join(f"{name} {scores[name][i, k]:.2f}" for name in scores)
            texts.append(f"{place + 1}. {captions[place]} ({values})")
    common.image_grid(images, texts, path, candidates.shape[1], titles=prompts[:rows])
