"""Where words matter: the loss of an image with its caption, and with a wrong one, by noise level.

A wrong caption differs from the right one in a single field of the scene (see `toy.shapes.FIELDS`)
and has the same words otherwise. The network reads both at the same x_t. Where the wrong one raises
the loss, the words decide what is drawn.
"""
import random

import numpy as np
import torch
from tqdm import tqdm

import common
import image_data
from common import UserError
from toy import judge
from toy.matching import tell_alike
from toy.shapes import FIELDS, change_field

TIMESTEPS = range(100, 1001, 100)


def captions_by_field(scenes, seed=0):
    """{"right": N captions, and for each of FIELDS N that are wrong in it alone}.

    scenes: N, each with two groups: one group has no relation to change.
    """
    captions = {name: [] for name in ("right", *FIELDS)}
    for i, scene in enumerate(scenes):
        rng = random.Random(f"{seed} {i}")
        changed = [change_field(scene, field, rng) for field in FIELDS]
        for name, caption in zip(captions, tell_alike([scene, *changed], rng)):
            captions[name].append(caption)
    return captions


@torch.no_grad()
def encode_text(pipeline, captions):
    """Caption tokens (N, L, D) and their mask (N, L), used for every t."""
    text, mask = pipeline.text_encoder(captions)
    with common.autocast(pipeline.device, pipeline.precision):
        return pipeline.model.encode_text(text, mask), mask


@torch.no_grad()
def losses(pipeline, x_0, y, mask, t, eps, batch_size=256):
    """The loss of each image at one t, in units of what the network predicts: (N,).

    x_0, eps (N, C, S, S); y, mask: from `encode_text`. Their mean is `uvit_fusion.diffusion_loss`.
    """
    found = []
    for start in range(0, len(x_0), batch_size):
        rows = slice(start, start + batch_size)
        times = torch.full((len(x_0[rows]),), t, device=pipeline.device)
        x_t = pipeline.diffusion.q_sample(x_0[rows], times, eps[rows])
        with common.autocast(pipeline.device, pipeline.precision):
            prediction = pipeline.model.denoise(x_t, times, y[rows], mask[rows])
        target = pipeline.diffusion.target_of(x_0[rows], times, eps[rows])
        found.append((prediction.float() - target).square().mean((1, 2, 3)))
    return torch.cat(found).cpu().numpy()


def measure(pipeline, data, samples, seed=0):
    """{"right" or a field: losses (T, N)} at TIMESTEPS, of N validation images, each with
    its right caption, or with one that is wrong in this field.

    N: those of the first `samples` images that show two groups. seed: of the noise, which all
    captions share.
    """
    scenes, _, _ = judge.validation_scenes(data, samples)
    chosen = [i for i, scene in enumerate(scenes) if scene.relation]
    if not chosen:
        raise UserError(f"--samples {samples}: none of these scenes has two groups: use more "
                        "(the world `simple` has none)")
    captions = captions_by_field([scenes[i] for i in chosen])
    tokens = {name: encode_text(pipeline, texts) for name, texts in captions.items()}
    dataset = image_data.CaptionedImages(data, "val", pipeline.image_size)
    x_0 = pipeline.encode(torch.stack([dataset.image(i) for i in chosen]), sample=False)
    generator = torch.Generator().manual_seed(seed)
    found = {name: [] for name in captions}
    for t in tqdm(TIMESTEPS, "noise levels", leave=False):
        eps = torch.randn(x_0.shape, generator=generator).to(pipeline.device)
        for name, (y, mask) in tokens.items():
            found[name].append(losses(pipeline, x_0, y, mask, t, eps))
    return {name: np.stack(rows) for name, rows in found.items()}


def report(found, title, path):
    """Prints what `measure` returns, draws it into `path`, returns the figures.

    <field>_rise_<t>: the mean by which a caption wrong in the field raises the loss;
    <field>_apart_<t>: % of images for which it does; each with its _ci; loss_<t>: right caption.
    """
    right = found["right"]
    figures = {"by_noise_images": right.shape[1]}
    rows = [["t", "loss", *(f"{field} +" for field in FIELDS), *(f"{f}, %" for f in FIELDS)]]
    curves = {field: [] for field in FIELDS}
    for k, t in enumerate(TIMESTEPS):
        figures[f"loss_{t}"] = float(right[k].mean())
        for field in FIELDS:
            rise = found[field][k] - right[k]                    # image by image
            figures[f"{field}_rise_{t}"] = float(rise.mean())
            figures[f"{field}_rise_{t}_ci"] = common.ci95(rise)
            figures |= common.percent(f"{field}_apart_{t}", rise > 0)
            curves[field].append((t, float(rise.mean())))
        rises = [f"{figures[f'{field}_rise_{t}']:.4f}" for field in FIELDS]
        apart = [figures[f"{field}_apart_{t}"] for field in FIELDS]
        rows.append([t, f"{figures[f'loss_{t}']:.4f}", *rises, *apart])
    common.print_table(rows, title)
    print(f"{right.shape[1]} images. +: how much a caption that is wrong in this field raises "
          f"the loss; %: for how many images it does. Drawn: {path}")
    common.plot(curves, path, "t (1000: pure noise)",
                "how much a wrong caption raises the loss, by the field that is wrong")
    return figures
