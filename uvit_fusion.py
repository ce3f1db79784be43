r"""Intermediate fusion of text in a U-shaped vision transformer (Hu, Jia, Rostami 2024, arXiv 2403.16530).

The idea. A diffusion transformer usually reads its caption from the first block to the last (early fusion). But the outer blocks of
a U-shaped ViT work on pixels, and their attention to text is of low rank: they have little use for it. So let them see the image
alone, give the caption a few blocks of its own, and join the two in the middle only (intermediate fusion): fewer operations, a
caption that can be understood once per prompt instead of once per step, and better alignment (counts, spatial relations).

    early          [time, text, patches] -> block x (depth + 1)                                                       -> noise
    intermediate   [time, patches] -> image block x v -\                               /-> image block x v            -> noise
                   [text] ----------> caption block x c -> joint block x (depth + 1 - 2v) -> text is dropped

The text joins by *concatenation* (it is more tokens) or by *cross-attention* (it is more keys and values, and is not updated).
Early fusion is v = c = 0 of either, so one class, `UViT`, is all four; early fusion by concatenation has the parameter names of the
published U-ViT (Bao et al. 2023, arXiv 2209.12152), whose weights load as they are. Long skips join block i to block depth - i.

Diffusion, in the names of the code (Ho et al. 2020); abar_t falls from 1 at t = 0 to about 0 at t = T:
    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                      (q_sample)
    loss   = | network(x_t, t, text) - target |^2      target: eps as in the paper, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, or x_0
    guided = uncond + w (cond - uncond)                                                   (classifier-free guidance, w = 1: none)

Shapes: x (B, C, S, S); patches (B, N, D) with N = (S / patch)^2; text features (B, L, text_dim); mask (B, L) bool; t (B,) in 0..T.

    python uvit_fusion.py --train              # toy world, two CPU cores: 13 to 18 min, 89 % of held-out captions right in all respects
    python uvit_fusion.py --train --quick      # the same in small, a first picture within two minutes
    python uvit_fusion.py --compare            # the paper's experiment in small: four variants, one table
    python uvit_fusion.py --analyse            # the rank of text-to-image attention, block by block
    python uvit_fusion.py --train --data path/to/coco --clip openai/clip-vit-large-patch14 --size 64 --out runs/coco
    torchrun --nproc_per_node 4 uvit_fusion.py --train --preset coco --data path/to/coco --autoencoder autoencoder_kl.pth --out runs/coco256

Differs from the paper (its released value in brackets):
 1. The preset toy draws 24 x 24 pixels by patches of 4 with width 128 and depth 6 [32 x 32 latents, 2, 512, 12]; `--preset coco` has the latter.
 2. toy predicts x_0 under a cosine schedule and draws t with more noise [eps, Stable Diffusion's schedule, uniform]: relations and counts
    are decided where almost all is noise, as `sample.py --film` shows.
 3. toy trains with Muon on the blocks' matrices [AdamW 2e-4, betas 0.9 and 0.9], and its average of the weights follows closely at first.
 4. toy starts from blocks that do nothing yet, weights of unit gain and places that stand out in noise [truncated normal 0.02], and hides
    the caption's padding [seen by all]. Relations are the last thing to be learned, and without 2, 3 and 4 together perhaps never: AdamW left
    them at chance (24 %) after 1750 steps, Muon without the idle blocks in one seed of two even after 4000.
 5. v = 2, c = 2 of 7 blocks in toy [v = 3, c = 3 of 13]. The released setting saves 6.8 % of the FLOPs by count, not the abstract's 20 %:
    `eval.py --cost` prints a table over v and c, and takes v = 5, c = 1 for the paper's size.
 6. toy samples by ancestral DDPM in 25 steps, coco by DPM-Solver++ 2M [DPM-Solver++, order 3, singlestep, 50 evaluations].
 7. Alignment is graded exactly [FID, CLIP score]; counts and relations have no released evaluation. The rank analysis is this project's own.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import autoencoder
import common
from autoencoder import Latents, draw_latents
from common import UserError, setting


@dataclass
class Settings:
    """Everything that makes a run: saved as config.json, read back by whatever loads the run."""
    # the picture and the text
    size: int = setting(24, 'S, side of the picture (or latent) that the network sees', low=1)
    channels: int = setting(3, 'C, 3 for pixels, 4 for latents', low=1)
    autoencoder: str = setting("", 'file or folder of the Stable Diffusion autoencoder that makes the latents (default: pixels)')
    latent_scale: float = setting(0.23010, 'latents are multiplied by it (U-ViT on MS-COCO: 0.23010; with pixels it has no meaning)', above=0)
    text_dim: int = 128            # set from the text encoder, like the next
    text_length: int = 20          # L
    mask_text: bool = setting(True, 'hide the padding of the caption (published U-ViT: False, trained over padding)')
    # the network
    patch: int = setting(4, 'side of a patch', low=1)
    dim: int = setting(128, 'D, width', low=1)
    depth: int = setting(6, 'blocks but one: depth / 2 in, one middle, depth / 2 out', low=1)
    heads: int = setting(4, 'attention heads', low=1)
    fusion: str = setting("concat", 'how the text joins: "concat" or "cross"', choices=("concat", "cross"))
    image_blocks: int = setting(2, 'v: blocks at either end that see the image only', low=0)
    caption_blocks: int = setting(2, 'c, blocks that see the caption only; early fusion: 0', low=0)
    init: str = setting("fan_in", 'first weights: "fan_in" (learns faster at small widths), "published" (normal, 0.02) or a file of weights')
    # the diffusion
    schedule: str = setting("cosine", '"cosine" or "linear" (Stable Diffusion\'s scaled linear)', choices=("cosine", "linear"))
    target: str = setting("x0", 'what the network predicts: "eps", "v" or "x0"', choices=("eps", "v", "x0"))
    clip_x0: bool = setting(True, 'keep predicted pictures within [-1, 1]: for pixels, not for latents')
    # the training
    batch: int = setting(64, 'pictures a step', low=1)
    steps: int = setting(3500, 'training steps', low=1)
    time_power: float = setting(0.3, 't = T u^power, u uniform: below 1 draws more noise, where a caption is obeyed or not', low=1e-3)
    optimizer: str = setting("muon", '"adamw", or "muon" for the matrices of the blocks and AdamW for the rest', choices=("adamw", "muon"))
    lr: float = setting(1e-3, 'highest learning rate of AdamW', above=0)
    muon_lr: float = setting(0.01, 'highest learning rate of Muon', above=0)
    warmup: int = setting(200, 'steps of linear warm-up', low=0)
    decay: float = setting(1.0, 'share of the steps, at the end, over which the rate falls to zero along a cosine', low=0, high=1)
    weight_decay: float = setting(0.03, 'of either optimiser, on every parameter', low=0)
    betas: tuple = setting((0.9, 0.99), 'of AdamW', low=0, high=0.99999)
    clip_grad: float = setting(1.0, 'largest norm of the gradient (0: no clipping)', low=0)
    ema: float = setting(0.998, 'decay of the running average of the weights', low=0, high=1)
    ema_warmup: bool = setting(True, 'let the average follow closely at first, when the weights still change fast')
    drop: float = setting(0.1, 'share of captions replaced by the empty one', low=0, high=1)
    seed: int = setting(0, 'of weights, order and noise', low=0, high=10**6)
    guidance: float = setting(3.0, 'w that pictures are drawn with unless another is asked for')
    # guided everywhere, 512 captions were 70.9 % right, in this interval 71.3 %, in two thirds of the time
    guidance_interval: tuple = setting((0.6, 1.0), 'share of the noise levels, t / T, at which they are guided')
    # of the same 2048 captions ddpm drew 86.8 % right in 25 steps, dpm 82.6 %
    sampler: str = setting("ddpm", 'that they are drawn with: "ddpm", "ddim" or "dpm"', choices=("ddpm", "ddim", "dpm"))
    # what it was trained on
    data: str = setting("shapes", '"shapes" (the toy world), a folder in the layout of MS-COCO, or one of pictures with a .txt beside each')
    clip: str = setting("runs/toy/clip", 'CLIP text model: a folder in the Hugging Face format or a name on its hub')
    method: str = "uvit_fusion"

    def __post_init__(self):
        """Raises UserError for settings that are out of range or do not fit together."""
        common.check_limits(self)
        if self.autoencoder and self.clip_x0:
            raise UserError("--autoencoder: latents do not keep within [-1, 1]: add --no-clip-x0")
        if self.size % self.patch:
            raise UserError(f"--size {self.size} cannot be cut into patches of {self.patch}: choose a multiple of {self.patch}, or another --patch")
        if self.dim % self.heads or self.dim % 2:
            raise UserError(f"--dim {self.dim} cannot be shared by {self.heads} heads: choose an even multiple of --heads")
        if self.depth % 2 or self.image_blocks > self.depth // 2:
            raise UserError(f"--depth {self.depth} must be even, and --image-blocks {self.image_blocks} at most half of it")


PRESETS = {
    "toy": {},
    # the published U-ViT-S/2 on MS-COCO, with the fusion of this paper's released code (U-ViT itself: image_blocks = caption_blocks = 0)
    "coco": dict(size=32, channels=4, text_dim=768, text_length=77, mask_text=False, patch=2, dim=512, depth=12, heads=8, image_blocks=3,
                 caption_blocks=3, init="published", schedule="linear", target="eps", clip_x0=False, time_power=1.0, optimizer="adamw", batch=256,
                 steps=1_000_000, lr=2e-4, warmup=5000, decay=0.0, weight_decay=0.03, betas=(0.9, 0.9), clip_grad=0.0, ema=0.9999,
                 ema_warmup=False, guidance=2.0, guidance_interval=(0.0, 1.0), sampler="dpm", data="coco", clip="openai/clip-vit-large-patch14"),
}


# -------------------------------------------------------------------------------------------------------------- attention
def softmax_attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v, as one reads it. q (B, H, Q, d), k and v (B, H, K, d), bias broadcastable to (B, H, Q, K)."""
    logits = (q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)                    # (B, H, Q, K); q is scaled, which has fewer numbers
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1).to(v.dtype) @ v                                 # (B, H, Q, d)


def attention(q, k, v, bias=None):
    """The same, and the faster way to it: but for bf16 on CPUs that is one kernel, which never stores the (Q, K) matrix.

    Forward and backward of (64, 4, 57, 32) on two CPU cores took the softmax 5.1 ms in bf16 and 6.2 in fp32, the kernel 30.6 and 5.4;
    of (8, 8, 334, 64), the paper's size, 25.5 and 66.0 against 40.8 and 35.7.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return softmax_attention(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)                        # rows: (q, k, v) x heads x d
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context=None, bias=None, record=None):
        """x (B, Q, D) attends to itself, or to [x, context] if there is a context (B, K - Q, D).

        record: a list that gets, for whoever wants to look, the logits q k^T / sqrt(d) + bias, (B, H, Q, K), with q and k, (B, H, Q or K, d).
        """
        split = functools.partial(rearrange, pattern="b n (parts h d) -> parts b h n d", h=self.heads)
        if context is None:
            q, k, v = split(self.qkv(x), parts=3)
        else:                                                                 # text is asked, but does not ask: no queries for it
            weight_q, weight_kv = self.qkv.weight.tensor_split([x.shape[-1]])
            (q,), (k, v) = split(F.linear(x, weight_q), parts=1), split(F.linear(torch.cat([x, context], dim=1), weight_kv), parts=2)
        if record is not None:
            logits = (q @ k.transpose(-2, -1)).float() * q.shape[-1]**-0.5
            record.append((logits if bias is None else logits + bias, q, k))
        return self.proj(rearrange(attention(q, k, v, bias), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; `skip` adds the linear layer that takes in a long skip."""
    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x, skip=None, context=None, bias=None, record=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x), None if context is None else self.norm1(context), bias, record)
        return x + self.mlp(self.norm2(x))


def init_fan_in(model):
    """First weights of unit gain, and blocks that begin as the identity, in any model of such blocks.

    Without the idle blocks one seed of the U-ViT still took relations at chance (24 %) after 4000 steps; with them a relation turned round in
    the caption raises the loss by 10 % after 400 to 900 steps, in each of four seeds.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.attn.proj.weight)
            nn.init.zeros_(module.mlp.fc2.weight)


# ------------------------------------------------------------------------------------------------------------------ U-ViT
def unpatchify(tokens, p):
    """(B, N, p p C) -> (B, C, S, S)"""
    return rearrange(tokens, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=math.isqrt(tokens.shape[1]), p1=p, p2=p)


def time_features(t, dim):
    """Sinusoids of the time step, cat(cos, sin): t (B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UViT(nn.Module):
    """U-ViT with text by early or intermediate fusion, through concatenation or cross-attention: see `Settings`.

    The parameters of early fusion by concatenation are those of the published checkpoints, by name and shape.
    """
    def __init__(self, s):
        super().__init__()
        self.patch, self.image_blocks, self.cross, self.mask_text = s.patch, s.image_blocks, s.fusion == "cross", s.mask_text
        self.recompute = False               # activation checkpointing: blocks are run again in the backward pass instead of being remembered
        self.length, patches, half = s.text_length, (s.size // s.patch)**2, s.depth // 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(s.channels, s.dim, s.patch, stride=s.patch)})
        self.context_embed = nn.Linear(s.text_dim, s.dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + s.text_length + patches, s.dim))       # [time, text, patches] in all variants
        self.in_blocks = nn.ModuleList(Block(s.dim, s.heads) for _ in range(half))
        self.mid_block = Block(s.dim, s.heads)
        self.out_blocks = nn.ModuleList(Block(s.dim, s.heads, skip=True) for _ in range(half))
        self.caption_blocks = nn.ModuleList(Block(s.dim, s.heads) for _ in range(s.caption_blocks))
        self.norm = nn.LayerNorm(s.dim)
        self.decoder_pred = nn.Linear(s.dim, s.patch**2 * s.channels)
        self.final_layer = nn.Conv2d(s.channels, s.channels, 3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if s.init == "fan_in":
            init_fan_in(self)
            # at the noise levels where relations are decided a patch is all noise: its place must still stand out in its token
            nn.init.normal_(self.pos_embed, std=1.0)
            self.patch_embed["proj"].weight.data.mul_(0.3)
        else:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def text_bias(self, mask, before, after):
        """The mask (B, L) as a bias on attention logits, (B, 1, 1, before + L + after): -inf on padding, 0 elsewhere."""
        if mask is None or not self.mask_text:
            return None
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
        return F.pad(bias, (before, after))[:, None, None]

    def encode_text(self, text, mask=None):
        """text (B, L, text_dim) -> caption tokens (B, L, D). Needs neither t nor x: once per prompt is enough when sampling."""
        y = self.context_embed(text)
        y = y + self.pos_embed[:, 1:1 + self.length].to(y.dtype)                       # under autocast all tokens stay in bf16, see `denoise`
        bias = self.text_bias(mask, 0, 0)
        for block in self.caption_blocks:
            y = self.run(block, y, bias=bias)
        return y

    def run(self, block, *inputs, **more):
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, **more)
        return block(*inputs, **more)

    def denoise(self, x, t, y, mask=None, record=None):
        """x (B, C, S, S), t (B,), caption tokens y (B, L, D), mask (B, L) -> (B, C, S, S). record: see `Attention`; one entry a block."""
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)                                                   # (B, N, D)
        # under autocast x is bf16; places in fp32 would turn all tokens to fp32, and every linear layer had to turn them back:
        # drawing took a third more time, a training step 5 % more
        pos_embed = self.pos_embed.to(x.dtype)
        patches, x = x.shape[1], x + pos_embed[:, 1 + self.length:]
        time = time_features(t, x.shape[-1]).to(x.dtype)[:, None] + pos_embed[:, :1]                                 # (B, 1, D)
        x = torch.cat([time, x], dim=1)                                                                              # (B, 1 + N, D)
        joint = dict(context=y, bias=self.text_bias(mask, 1 + patches, 0)) if self.cross else dict(bias=self.text_bias(mask, 1, patches))
        blocks, v, skips = [*self.in_blocks, self.mid_block, *self.out_blocks], self.image_blocks, []
        for i, block in enumerate(blocks):
            if i == v and not self.cross:
                x = torch.cat([x[:, :1], y, x[:, 1:]], dim=1)                          # [time, text, patches]
            if i == len(blocks) - v and not self.cross:
                x = torch.cat([x[:, :1], x[:, -patches:]], dim=1)                      # text is dropped
            skip = skips.pop() if i > len(blocks) // 2 else None                       # last in, first out
            x = self.run(block, x, skip, record=record, **(joint if v <= i < len(blocks) - v else {}))
            if i < len(blocks) // 2:
                skips.append(x)
        tokens = self.decoder_pred(self.norm(x))[:, -patches:]                         # time, and in early fusion text, is dropped
        return self.final_layer(unpatchify(tokens, self.patch))

    def forward(self, x, t, text, mask=None, record=None):
        return self.denoise(x, t, self.encode_text(text, mask), mask, record)


# -------------------------------------------------------------------------------------------------------------- diffusion
class Diffusion:
    """Noise schedule, training loss and samplers. `abar` has T + 1 entries, abar[0] = 1 (no noise)."""
    T = 1000

    def __init__(self, schedule="linear", target="eps", clip_x0=False):
        self.target, self.clip_x0 = target, clip_x0
        if schedule == "linear":                                                       # Stable Diffusion's: sqrt(beta) is linear
            beta = torch.linspace(0.00085**0.5, 0.0120**0.5, self.T, dtype=torch.float64)**2
        else:                                                                          # Nichol and Dhariwal 2021, eq. 17
            f = torch.cos((torch.arange(self.T + 1, dtype=torch.float64) / self.T + 0.008) / 1.008 * math.pi / 2)**2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)                               # abar_T stays above 0
        self.abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])

    def times(self, u, power):
        """t = T u^power, in 1..T: u (B,), uniform in [0, 1) -> (B,)."""
        return 1 + (self.T * u**power).long().clamp(max=self.T - 1)

    def scales(self, t, like):
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1)."""
        # the small tables go to the device of t: asking for t here would make a GPU wait
        return (scale.to(like)[t.to(like.device)].view(-1, 1, 1, 1) for scale in (self.abar.sqrt(), (1 - self.abar).sqrt()))

    def q_sample(self, x_0, t, eps):
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps"""
        a, s = self.scales(t, x_0)
        return a * x_0 + s * eps

    def loss(self, network, x_0, t, eps):
        """Mean squared error of network(x_t, t) against the target; x_0, eps (B, C, S, S), t (B,)."""
        a, s = self.scales(t, x_0)
        target = {"eps": eps, "v": a * eps - s * x_0, "x0": x_0}[self.target]
        return F.mse_loss(network(self.q_sample(x_0, t, eps), t).float(), target)

    def predict(self, output, x_t, t):
        """(x_0, eps) that the network's output stands for."""
        a, s = self.scales(t, x_t)
        if self.target == "eps":
            x_0 = (x_t - s * output) / a
        elif self.target == "v":
            x_0 = a * x_t - s * output
        else:
            x_0 = output
        if self.clip_x0:
            x_0 = x_0.clamp(-1, 1)
        return x_0, (x_t - a * x_0) / s

    def posterior(self, x_0, x_t, t, r):
        """Mean and variance of q(x_r | x_t, x_0), r < t. With r = t - 1: Ho et al. 2020, eq. 7."""
        at, ar = self.abar[t], self.abar[r]
        step = at / ar                                                                 # the alpha of the whole stride
        mean = (ar.sqrt() * (1 - step) * x_0 + step.sqrt() * (1 - ar) * x_t) / (1 - at)
        return mean, (1 - step) * (1 - ar) / (1 - at)

    @torch.no_grad()
    def sample(self, network, x, steps=25, sampler="dpm", noise=None, film=None):
        """Turns noise x (B, C, S, S) into pictures.

        network(x_t, t) -> output, already guided; sampler: "ddpm" (ancestral), "ddim" (Song et al. 2021, eta 0) or "dpm" (DPM-Solver++
        2M, Lu et al. 2022); noise(): fresh noise like x, for ddpm; film: a list that gets the predicted x_0 of every step.
        """
        if sampler not in ("ddpm", "ddim", "dpm"):
            raise UserError(f"--sampler {sampler}: choose ddpm, ddim or dpm")
        if not 1 <= steps <= self.T:
            raise UserError(f"--sample-steps {steps}: choose 1 to {self.T}")
        times = torch.linspace(self.T, 0, steps + 1).round().long()
        half_log_snr = 0.5 * (self.abar.log() - (1 - self.abar).log())                 # lambda of DPM-Solver; infinite at t = 0
        previous, h_previous = None, None
        for t, r in zip(times[:-1], times[1:]):
            x_0, eps = self.predict(network(x, t.expand(len(x)).to(x.device)).float(), x, t.expand(len(x)))
            if film is not None:
                film.append(x_0)
            a_r, s_r = self.abar[r].sqrt().item(), (1 - self.abar[r]).sqrt().item()
            if r == 0:
                x = x_0
            elif sampler == "ddpm":
                mean, variance = self.posterior(x_0, x, t, r)
                x = (mean + variance.sqrt() * noise()).to(x_0.dtype)
            elif sampler == "ddim":
                x = a_r * x_0 + s_r * eps
            else:
                # second order: extrapolate x_0 to the middle of the stride from the last two predictions
                h = (half_log_snr[r] - half_log_snr[t]).item()
                d = x_0 if previous is None else x_0 + 0.5 * h / h_previous * (x_0 - previous)
                x = s_r / (1 - self.abar[t]).sqrt().item() * x - a_r * math.expm1(-h) * d
                previous, h_previous = x_0, h
        return x


def guided(model, text, mask, null, null_mask, w, interval=(0.0, 1.0)):
    """network(x, t) for `Diffusion.sample` with classifier-free guidance, uncond + w (cond - uncond), in one doubled batch.

    text (B, L, D) and mask (B, L) of the prompts; null (1, L, D) of the empty (or negative) prompt. The caption blocks run here, once.
    interval: guide only where t / T lies in it (Kynkaanniemi et al. 2024); elsewhere the conditional model alone draws, at half the cost.
    """
    y = model.encode_text(text, mask)
    if w == 1:
        return lambda x, t: model.denoise(x, t, y, mask)
    y_both = torch.cat([y, model.encode_text(null, null_mask).expand(len(text), -1, -1)])
    mask_both = torch.cat([mask, null_mask.expand(len(text), -1)])

    def network(x, t):
        if not interval[0] <= t[0].item() / Diffusion.T <= interval[1]:
            return model.denoise(x, t, y, mask)
        cond, uncond = model.denoise(torch.cat([x, x]), torch.cat([t, t]), y_both, mask_both).float().chunk(2)
        return uncond + w * (cond - uncond)
    return network


# ----------------------------------------------------------------------------------------------------------------- drawing
class Painter:
    """A network with all it needs to draw: what `sample.py`, `eval.py` and the other methods work with."""
    def __init__(self, model, encoder, settings, folder, device, precision):
        self.model, self.encoder, self.settings, self.folder, self.device, self.precision = model, encoder, settings, folder, device, precision
        self.diffusion, self.autoencoder = Diffusion(settings.schedule, settings.target, settings.clip_x0), autoencoder.load_for(settings, device)
        self.side = settings.size * (self.autoencoder.factor if self.autoencoder else 1)              # of the pictures, in pixels

    @torch.no_grad()
    def draw(self, prompts, steps=25, guidance=None, interval=None, sampler=None, negative="", seed=0, first=0, batch=256,
             progress=False, film=None):
        """Pictures for prompts: numpy uint8 (len(prompts), H, W, 3).

        Picture i has noise of its own, which depends on the seed and on first + i alone, so that two models can be compared picture by
        picture and a long list drawn in parts. guidance, interval, sampler: default those of the settings; film: a list that gets, for
        every step, the pictures (uint8) that the network then believes in.
        """
        s, pictures, films = self.settings, [], []
        sampler = sampler or s.sampler
        guidance, interval = s.guidance if guidance is None else guidance, s.guidance_interval if interval is None else interval
        null, null_mask = self.encoder([negative])
        for start in tqdm(range(0, len(prompts), batch), desc="drawing", unit="batch", leave=False, disable=not progress):
            some = prompts[start:start + batch]
            generators = [torch.Generator().manual_seed(seed * 10**9 + first + start + i) for i in range(len(some))]

            def noise(generators=generators):
                return torch.stack([torch.randn(s.channels, s.size, s.size, generator=g) for g in generators]).to(self.device)
            seen = None if film is None else []
            text, mask = self.encoder(some)
            with common.autocast(self.device, self.precision):
                network = guided(self.model, text, mask, null, null_mask, guidance, interval)
                pictures.append(self.to_pictures(self.diffusion.sample(network, noise(), steps, sampler, noise, seen)))
                films.append([self.to_pictures(x_0) for x_0 in seen or []])
        if film is not None:
            film += [np.concatenate(step) for step in zip(*films)]
        return np.concatenate(pictures)

    def to_pictures(self, x_0):
        """What the network draws (B, C, S, S) as uint8 pictures (B, H, W, 3); latents are decoded, a few at a time."""
        if self.autoencoder is None:
            return common.to_uint8(x_0)
        return np.concatenate([common.to_uint8(self.autoencoder.decode(z / self.settings.latent_scale)) for z in x_0.split(16)])

    def to_x_0(self, pictures, noise=None):
        """Pictures of a data set as the network sees them, x_0 (B, C, S, S).

        pictures: what `data` gives, uint8 (B, 3, S, S); or moments of latents, float16 (B, 2, C, S, S), with noise (B, C, S, S).
        """
        pictures = pictures.to(self.device, non_blocking=True)
        return common.to_float(pictures) if self.autoencoder is None else self.settings.latent_scale * draw_latents(pictures, noise)

    def data(self, folder, split, latents="data/latents"):
        """The captioned pictures of a split, of which `to_x_0` makes what the network sees; latents are computed once, into a folder."""
        if self.autoencoder is None:
            return common.CaptionedImages(folder, split, self.settings.size)
        return Latents(folder, split, self.side, self.autoencoder, self.settings.autoencoder, latents, self.device)

    def identity(self):
        """Names the network and its text encoder, down to their weights. Raises UserError for a run of an adapter, which has no such encoder."""
        if not isinstance(self.encoder, common.TextEncoder):
            raise UserError(f"{self.folder}/ is a run of an adapter, which reads text in its own way: name a run of uvit_fusion.py")
        return common.fingerprint(nn.ModuleList([self.model, self.encoder.model]))


def load(path, device, precision):
    """The painter of a run folder (its model.safetensors), or of a .safetensors file in one."""
    folder, weights = common.run_files(path)
    s = common.read_settings(Settings, folder)
    return make_painter(s, common.TextEncoder(s.clip, device), common.read_weights(weights, f"checkpoint {weights}"), weights, folder, precision)


def make_painter(s, encoder, tensors, weights, folder, precision):
    """The painter of a network of these settings and weights; weights: their file, for messages. Raises UserError if they or the text do not fit."""
    model = UViT(s).to(encoder.device).eval().requires_grad_(False)
    common.load_into(model, tensors, weights)
    if (encoder.dim, encoder.length) != (s.text_dim, s.text_length):
        raise UserError(f"{weights} reads text of {s.text_length} tokens x {s.text_dim}, but {s.clip} gives {encoder.length} x {encoder.dim}: "
                        "put back the text encoder that it was trained with")
    return Painter(model, encoder, s, folder, encoder.device, precision)


# ---------------------------------------------------------------------------------------------------------------- training
def learning_rate(s, step):
    """Share of the highest learning rate at a step (the first is 1): linear warm-up, constant, and along a cosine to zero at the end."""
    share, begin = min(1, step / max(1, s.warmup)), s.steps * (1 - s.decay)
    return share * 0.5 * (1 + math.cos(math.pi * (step - begin) / (s.steps - begin))) if step > begin else share


def set_rates(optimizers, s, step):
    """Gives what `make_optimizers` made its learning rates for a step."""
    for optimizer, highest in zip(optimizers, (s.lr, s.muon_lr)):
        for group in optimizer.param_groups:
            group["lr"] = highest * learning_rate(s, step)


def make_optimizers(model, s, named=lambda name: "block" in name):
    """AdamW on everything, as published; or Muon (Jordan et al. 2024) on the matrices of such names, here those of blocks, and AdamW on the rest.

    Muon's steps are of equal size in all directions of a matrix, also in those of small gradient. Measured at the highest noise levels with
    patches of 8: a relation turned round in the caption raised the loss by 35 % after 600 steps of Muon, and by nothing after 600 of AdamW.
    """
    matrices = [p for name, p in model.named_parameters() if s.optimizer == "muon" and p.ndim == 2 and named(name)]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(rest, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay, fused=True)]
    return optimizers + ([torch.optim.Muon(matrices, lr=s.muon_lr, weight_decay=s.weight_decay)] if matrices else [])


def train(s, data, folder, ranks, precision, options=common.Options()):
    """Trains a U-ViT on the captioned pictures in `data` and fills the run folder; returns its painter (EMA weights).

    What step n does depends on the settings and on n alone, so a resumed run equals an uninterrupted one, bit for bit on the CPU.
    ranks: `common.Ranks`; each takes its share of every batch, gradients are averaged, rank 0 writes.
    """
    import eval as grade  # here, since these import this file
    import sample
    folder, device, share = Path(folder), ranks.device, s.batch // ranks.count
    if share // options.accumulate * options.accumulate * ranks.count != s.batch:
        raise UserError(f"--batch {s.batch} cannot be shared by {ranks.count} processes x {options.accumulate} parts: "
                        f"choose a multiple of {ranks.count * options.accumulate}")
    encoder = common.TextEncoder(s.clip, device)
    s = dataclasses.replace(s, text_dim=encoder.dim, text_length=encoder.length)
    torch.manual_seed(s.seed)
    model = UViT(s).to(device)
    if s.init not in ("fan_in", "published"):
        tensors = common.read_weights(s.init, f"--init {s.init}")
        new = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("caption_blocks.") and name not in tensors}
        common.load_into(model, new | tensors, s.init)                  # published weights have no caption blocks: those begin as they are
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.recompute = options.recompute
    optimizers = make_optimizers(model, s)
    painter = Painter(ema, encoder, s, folder, device, precision)
    with ranks.first():
        dataset = painter.data(data, "train", options.latents)
        state = common.open_run(folder, s, options, precision) if options.resume or not ranks.rank else None
    start, halfway = 0, math.inf                               # halfway: how far from 50 % right early.safetensors is, in points
    watch = options.watch and not ranks.rank and "scene" in dataset.items[0][2]
    if state:
        common.load_into(model, state["model"], folder / "state.pt")
        common.load_into(ema, state["ema"], folder / "state.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start, halfway, watch = state["step"], state["halfway"], watch and state["watch"]
    network = torch.compile(model) if options.compile else model
    if ranks.count > 1:
        network = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    metrics = None if ranks.rank else common.Metrics(folder, ["step", "loss", "lr", "all"], start)
    broken, generator = common.BrokenPictures(len(dataset)), torch.Generator(device)
    uniform, normal = (functools.partial(draw, generator=generator, device=device) for draw in (torch.rand, torch.randn))
    mine, shape = slice(ranks.rank * share, (ranks.rank + 1) * share), (s.batch, s.channels, s.size, s.size)
    loader = common.batches(dataset, s.batch, start, s.steps, s.seed, options.workers, ranks)
    losses, stop = [], False

    with common.Interrupt() as interrupt, tqdm(total=s.steps, initial=start, desc=s.fusion, unit="step", disable=ranks.rank > 0) as progress:
        for step, (pictures, captions, unread) in enumerate(loader, start + 1):
            broken.add(unread, pictures)
            set_rates(optimizers, s, step)
            # every rank draws the noise of the whole batch and takes its share, so that their number does not change the training
            generator.manual_seed(s.seed * 10**9 + step)
            dropped = (uniform(s.batch) < s.drop)[mine].tolist()
            t = painter.diffusion.times(uniform(s.batch), s.time_power)[mine]
            eps = normal(shape)[mine]
            x_0 = painter.to_x_0(pictures, normal(shape)[mine] if painter.autoencoder else None)
            # a dropped caption is replaced by the empty one, which the text encoder encodes like any other
            text, mask = encoder(["" if drop else caption for drop, caption in zip(dropped, captions)])
            model.zero_grad()
            for part, values in enumerate(zip(*(value.chunk(options.accumulate) for value in (x_0, t, eps, text, mask))), 1):
                # gradients are averaged over the ranks once a step, with the last part
                with contextlib.nullcontext() if part == options.accumulate or ranks.count == 1 else network.no_sync():
                    with common.autocast(device, precision):
                        loss = painter.diffusion.loss(functools.partial(network, text=values[3], mask=values[4]), *values[:3])
                    (loss / options.accumulate).backward()
                losses.append(loss.detach())
            if s.clip_grad:
                torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(s.ema, step / (step + 10)) if s.ema_warmup else s.ema
            common.follow(ema, model, decay)
            progress.update()

            # what follows is decided by the step alone, and so by all ranks alike; a Ctrl-C may reach them at different steps
            save, look = step % options.save_every == 0 or step == s.steps, step > s.steps // 4 and step % max(1, s.steps // 24) == 0
            if not (save or look or step % 20 == 0 or interrupt.asked and ranks.count == 1):
                continue
            (mean, asked), losses = ranks.mean([torch.stack(losses).mean().item(), float(interrupt.asked)]), []
            stop = asked > 0
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at step {step}; the last checkpoint stays as it was: try a lower --lr, or --precision fp32")
            if not ranks.rank:
                all_right = ""
                if watch and look:
                    all_right, halfway = grade.keep_halfway(painter, data, halfway)
                    watch = all_right < 65                                                 # far enough beyond a half not to come back
                metrics.add(step, mean, s.lr * learning_rate(s, step), all_right)
                progress.set_postfix(loss=f"{mean:.4f}")
                if save or stop:
                    common.save_tensors(ema.state_dict(), folder / "model.safetensors")
                    with common.whole(folder / "state.pt") as unfinished:
                        torch.save({"model": model.state_dict(), "ema": ema.state_dict(),
                                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                                    "step": step, "halfway": halfway, "watch": watch, "precision": str(precision)}, unfinished)
                    sample.plot({"loss": metrics.column("loss")}, folder / "loss.png", "step", "mean squared error", log=True)
            if stop:
                break
    if stop:
        print(f"stopped after step {step}; to go on: the same command with --resume")
        sys.exit(130)
    if broken.paths:
        print(f"{len(broken.paths)} pictures could not be read and were replaced")
    if encoder.cut:
        print(f"{encoder.cut} of the captions, counted each time they came, were longer than {encoder.length} tokens and were cut off")
    return painter


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("what to do")
    action = what.add_mutually_exclusive_group()
    action.add_argument("--train", action="store_true", help="train, draw validation captions and, on the toy world, grade them")
    action.add_argument("--compare", action="store_true", help="train and grade the four fusion variants (long)")
    action.add_argument("--analyse", action="store_true", help="measure the rank of text-to-image attention, block by block, of --run")
    what.add_argument("--quick", action="store_true", help="with --train or --compare: the same in small, into a folder of its own")
    parser.add_argument("--run", default="runs/uvit_fusion", help="--analyse: the run to look at (default %(default)s)")
    parser.add_argument("--seeds", type=common.positive, default=3, help="--compare: seeds for concatenation (default %(default)s)")
    parser.add_argument("--no-cross", action="store_true", help="--compare: leave out the two variants with cross-attention")
    parser.add_argument("--samples", type=common.positive, default=2048, help="held-out captions to grade (default %(default)s)")
    common.add_training_flags(parser, Settings, PRESETS, "run folder (default runs/uvit_fusion; --quick: runs/quick; --compare: runs/compare)")
    args = parser.parse_args()
    if not (args.train or args.compare or args.analyse):
        parser.print_help()
        return
    import eval as grade
    import sample
    import toy
    if args.analyse:
        painter = sample.load_run(args.run, args.device, args.precision)
        grade.analyse(painter, toy.prepare(painter.settings.data, painter.settings.clip, painter.side), painter.folder)
        return
    s, options, ranks = common.make_settings(Settings, PRESETS, args), common.make_settings(common.Options, None, args), common.Ranks(args.device)
    precision = ranks.precision(args.precision)
    if args.quick:
        s, args.samples = dataclasses.replace(s, steps=min(s.steps, 200), warmup=min(s.warmup, 40)), min(args.samples, 256)
    side = s.size * (8 if s.autoencoder else 1)                                            # of the toy world's pictures
    if args.compare:
        if ranks.count > 1:
            raise UserError("--compare trains its variants in one process: without torchrun")
        folder = args.out or ("runs/compare-quick" if args.quick else "runs/compare")
        variants = [name for name in grade.VARIANTS if not (args.no_cross and "cross" in name)]
        grade.compare(s, toy.prepare(s.data, s.clip, side), folder, ranks, precision, options, args.seeds, args.samples, variants)
        return
    folder = Path(args.out or ("runs/quick" if args.quick else "runs/uvit_fusion"))
    if args.preset != "toy":
        print(f"preset {args.preset}: {', '.join(f'{name} {value}' for name, value in dataclasses.asdict(s).items() if value != '')}")
    print(f"{s.steps} steps of {s.batch} pictures on {ranks.device}{f' x {ranks.count}' * (ranks.count > 1)} in {str(precision)[6:]}, into {folder}/")
    with ranks.first():
        if not ranks.rank:
            common.check_run(folder, options)
        data = toy.prepare(s.data, s.clip, side)
    common.CaptionedImages(data, "val", s.size)                                            # refused now, not after days of training
    options.watch = not args.quick
    painter = train(s, data, folder, ranks, precision, options)
    if not ranks.rank:
        grade.report(painter, data, args.samples, begin, __file__)


if __name__ == "__main__":
    common.entry(main)
