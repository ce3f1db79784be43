"""The diffusion of uvit_fusion.py where one can see all of it: in the plane, and on few pictures.

    python -m course.lab spiral        # a small network learns a spiral; half a minute
    python -m course.lab perfect       # the perfect denoiser of 2 000 toy pictures; a minute

If N pictures x_i are all the data there is, the best answer at x_t is known. x_t is normal around
sqrt(abar) x_i with variance 1 - abar, for an i drawn at random, so by Bayes' rule

    E[x_0 | x_t] = sum_i w_i x_i,     w = softmax_i(-|x_t - sqrt(abar) x_i|^2 / (2 (1 - abar)))

No network can have a lower loss on these pictures. What does it draw? Exercise 1.5.
"""
import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import trange

import common
import image_data
from toy import shapes
from uvit_fusion import Diffusion, diffusion_loss, timestep_embedding

SAMPLERS = ("ddpm", "ddim", "dpm")
STEPS = 25              # of sampling
OUT = Path("runs/lab")


def perfect_denoiser(diffusion, data):
    """denoiser(x_t, t) -> E[x_0 | x_t] of data (N, C, S, S); all of x_t at the same t."""
    flat = data.flatten(1).double()

    def denoiser(x_t, t):
        abar = diffusion.abar[t[0]]
        distance = torch.cdist(x_t.flatten(1).double(), abar.sqrt() * flat)         # (B, N)
        weights = (-distance**2 / (2 * (1 - abar))).softmax(1)
        return (weights @ flat).view_as(x_t).float()
    return denoiser


def draw(denoiser, diffusion, shape, sampler, steps, trajectory=None):
    """Samples of this shape, from the same noise for every sampler."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    return diffusion.sample(denoiser, x, steps, sampler, lambda: torch.randn(shape), trajectory)


def nearest(drawn, data):
    """The number of the nearest of the data, (B,), and the rms of the difference, (B,)."""
    distance, number = torch.cdist(drawn.flatten(1), data.flatten(1)).min(1)
    return number, distance / data[0].numel()**0.5


def rms(values):
    return values.square().mean().sqrt().item()


# --------------------------------------------------------------------------------------- the plane
def spiral(n):
    """Points of a spiral as images of two channels and one pixel: (n, 2, 1, 1)."""
    radius = 0.4 + 1.4 * torch.rand(n)
    angle = 1.5 * math.pi * radius
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return (points + 0.02 * torch.randn(n, 2))[..., None, None]


class PointNet(nn.Module):
    """In the place of a U-ViT: x (B, 2, 1, 1), t (B,) -> (B, 2, 1, 1)."""
    def __init__(self, dim=128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 + 32 + 32, dim), nn.GELU(), nn.Linear(dim, dim),
                                    nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 2))

    def forward(self, x, t, text=None, mask=None):
        # sinusoids of the place, too: of bare coordinates the spiral is learned slowly
        place = timestep_embedding(10 * x.flatten(), 16).view(len(x), 32)
        time = timestep_embedding(t, 32)
        return self.layers(torch.cat([x.flatten(1), place, time], dim=1)).view_as(x)


def scatter(points):
    """Points (n, 2, 1, 1) as an image, uint8 (48, 48, 3)."""
    x, y = points.flatten(1).T.numpy()
    counts, _, _ = np.histogram2d(-y, x, bins=48, range=[(-2.5, 2.5)] * 2)
    return np.where(counts[..., None] > 0, np.uint8(shapes.COLOURS["blue"]), np.uint8(255))


def train_points(diffusion, steps=1500):
    model = PointNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="training"):
        x_0 = spiral(512)
        t = diffusion.sample_timesteps(len(x_0), 1.0, "cpu")
        loss = diffusion_loss(model, diffusion, x_0, t, torch.randn_like(x_0), None, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def show_spiral():
    torch.manual_seed(0)
    diffusion = Diffusion("cosine", "v")
    model = train_points(diffusion)
    data = spiral(2000)
    shown = {}
    for t in (0, 200, 500, 1000):
        noise = torch.randn_like(data)
        shown[f"the data at t = {t}"] = diffusion.q_sample(data, torch.full((len(data),), t), noise)
    for sampler in SAMPLERS:
        drawn = draw(model, diffusion, data.shape, sampler, STEPS)
        shown[f"{sampler}: rms to the nearest {rms(nearest(drawn, data)[1]):.3f}"] = drawn
    few = data[:20]
    diffusion = Diffusion("cosine", "x0")
    # the last step comes near to t = 0, where the weights choose one point
    drawn = draw(perfect_denoiser(diffusion, few), diffusion, data.shape, "ddpm", 500)
    shown[f"perfect, of 20 points: rms to the nearest {rms(nearest(drawn, few)[1]):.3f}"] = drawn
    images = [scatter(points) for points in shown.values()]
    common.image_grid(images, list(shown), OUT / "spiral.png", columns=4)


# ------------------------------------------------------------------------------------ toy pictures
def show_perfect():
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng) for _ in range(2000)]
    pictures = np.stack([shapes.render(shapes.layout(scene, rng), 24, rng) for scene in scenes])
    data = image_data.to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    diffusion = Diffusion("cosine", "x0")
    denoiser = perfect_denoiser(diffusion, data)
    shown = range(0, STEPS, 3)
    images = []
    texts = []
    for sampler in SAMPLERS:
        trajectory = []
        drawn = draw(denoiser, diffusion, (64, *data.shape[1:]), sampler, STEPS, trajectory)
        number, off = nearest(drawn, data)
        print(f"{sampler}: {len(drawn)} pictures, rms to the nearest of {len(data)}: "
              f"{rms(off):.4f} on average, {off.max():.4f} at most")
        steps = torch.stack([trajectory[step][0] for step in shown])
        images += [*image_data.to_uint8(steps), pictures[number[0]]]
        texts += [*(f"step {step + 1}" for step in shown), "nearest"]
    common.image_grid(images, texts, OUT / "perfect.png", len(shown) + 1, titles=SAMPLERS)
    _, between = nearest(data[:1000], data[1000:])
    print(f"from a picture to the nearest of 1000 others: {rms(between):.3f}")


def main():
    parser = argparse.ArgumentParser(prog="course.lab", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("spiral", "perfect"))
    args = parser.parse_args()
    {"spiral": show_spiral, "perfect": show_perfect}[args.what]()
    print(f"drawn: {OUT / args.what}.png")


if __name__ == "__main__":
    common.entry(main)
