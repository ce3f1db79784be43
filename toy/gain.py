"""What a model gains and loses by being tuned, on the toy world: the share of held-out captions
that it gets right, the distance from real images, and how varied the images of one caption are.

`pipeline` is a `uvit_fusion.Pipeline`, `clip` a `common.ClipScorer`.
"""
import random

import numpy as np
import torch

import common
from toy import judge, shapes

CAPTIONS = 64                    # held-out captions that diversity is measured on
EACH = 8                         # images of each of them


def diversity(images, clip, each=EACH):
    """Mean distances between two images of one caption: {"diversity": ..., "clip_diversity": ...}.

    images: uint8 (captions x each, H, W, 3), those of a caption side by side. The first is the root
    mean square distance of pixels in [0, 1], and sees where things stand. The second, 1 - cos of
    CLIP's features, sees wrong images among right ones.
    """
    pixels = torch.from_numpy(images).flatten(1).float() / 255
    pixels = pixels.unflatten(0, (-1, each))                                # (captions, each, HW3)
    features = clip.images(images).unflatten(0, (-1, each))                 # (captions, each, D)
    exact = "donot_use_mm_for_euclid_dist"                   # so equal images are at distance 0
    distances = torch.cdist(pixels, pixels, compute_mode=exact) / pixels.shape[-1]**0.5
    cosines = features @ features.mT                                        # (captions, each, each)
    correction = each / (each - 1)           # the means count each image with itself, at distance 0
    return {"diversity": float(distances.mean()) * correction,
            "clip_diversity": float((1 - cosines).mean()) * correction}


def rendered_diversity(pipeline, data):
    """The diversity of rendered images of the held-out captions, to compare with."""
    rng = random.Random(5)
    images = []
    for scene in judge.validation_scenes(data, CAPTIONS)[0]:
        for _ in range(EACH):
            images.append(shapes.render(shapes.layout(scene, rng), pipeline.image_size, rng))
    clip = common.ClipScorer(pipeline.cfg.clip, pipeline.device)
    return diversity(np.stack(images), clip)


def clip_distance(images, data, clip):
    """The Frechet distance between CLIP's features of N images and of N real validation images."""
    dataset = common.CaptionedImages(data, "val", images.shape[1])
    real = torch.stack([dataset.image(i) for i in range(len(images))]).permute(0, 2, 3, 1)
    real_statistics = common.feature_statistics(clip.images(real).cpu())
    return common.frechet_distance(
        *real_statistics, *common.feature_statistics(clip.images(images).cpu()))


def measure(pipeline, data, samples, rewards=None, **sampling):
    """Figures of what a pipeline generates for the first `samples` held-out captions.

    "right": the judge's verdicts (N,); the mean of each reward; "distance", "diversity" and
    "clip_diversity". rewards: a `fine_rewards.Rewards`; sampling: for `pipeline.generate`.
    """
    scenes, captions, unseen = judge.validation_scenes(data, samples)
    images = pipeline.generate(captions, progress=True, **sampling)
    figures = {"right": judge.grade_images(images, scenes, unseen)["all"]}
    if rewards:
        for name, values in rewards(images, captions).items():
            figures[name] = float(values.mean())
    clip = common.ClipScorer(pipeline.cfg.clip, pipeline.device)
    figures["distance"] = clip_distance(images, data, clip)
    repeated = [caption for caption in captions[:CAPTIONS] for _ in range(EACH)]
    return figures | diversity(pipeline.generate(repeated, seed=5, **sampling), clip)


def report(progress, own, rendered, folder):
    """Prints what a training has gained, and draws it as rewards.png. Returns the figures.

    progress: figures of `measure`, before the first round and after each; own: verdicts on the base
    with its own guidance, not that of the tuned model; rendered: of `rendered_diversity`.
    """
    start = progress[0]
    final = progress[-1]
    figures = common.percent("start", start["right"]) | common.percent("start_own", own)
    figures |= common.percent("final", final["right"])
    figures |= common.percent("gain", final["right"] - start["right"])
    rounds = [f"round {n}" for n in range(1, len(progress))]
    rows = [["held-out captions", "start", *rounds, "rendered"]]
    curves = {}
    for name in start:
        values = [float(np.mean(measured[name])) for measured in progress]
        cells = [f"{value:.4f}" for value in values]
        rows.append([name, *cells, f"{rendered[name]:.4f}" if name in rendered else ""])
        if name in ("distance", "diversity", "clip_diversity"):
            figures[f"{name}_start"] = values[0]
            figures[f"{name}_final"] = values[-1]
        else:
            curves[name] = list(enumerate(values))
    for name, value in rendered.items():
        figures[f"{name}_real"] = value
    common.print_table(rows, f"{folder}: {len(start['right'])} held-out captions")
    print(f"right: {figures['start']:.1f} +- {figures['start_ci']:.1f} % at the start, "
          f"{figures['start_own']:.1f} % with the base's own guidance; in the end "
          f"{figures['final']:.1f} +- {figures['final_ci']:.1f} %. "
          f"Gained, image by image: {figures['gain']:.1f} +- {figures['gain_ci']:.1f} points")
    common.plot(curves, folder / "rewards.png", "round",
                "held-out captions: share judged right, mean rewards")
    return figures
