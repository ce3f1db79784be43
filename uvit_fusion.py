r"""Intermediate fusion of text in a U-shaped ViT (Hu, Jia, Rostami 2024, arXiv 2403.16530).

The idea. A diffusion transformer usually reads its caption in every block (early fusion). But the
outer blocks of a U-shaped ViT work on pixels and have little use for text: there, text-to-image
attention is of low rank. So the outer blocks see the image alone, the caption gets a few blocks of
its own, and the two are joined in the middle (intermediate fusion). That costs fewer operations,
and the caption blocks run once per prompt instead of once per sampling step.

    early         [time, text, patches] -> block x (depth + 1) -> prediction
    intermediate  [time, patches] -> image block x v --+
                  [text] ---> caption block x c -------+-> joint block x (depth + 1 - 2v)
                                         -> drop text, image block x v -> prediction

Text joins by concatenation (as extra tokens) or by cross-attention (as extra keys and values).
Early fusion is v = c = 0, so one class, `UViT`, covers all four variants. A long skip joins block i
to block depth - i. Early fusion by concatenation has the parameter names of the published U-ViT
(Bao et al. 2023, 2209.12152): its weights load as they are.

Diffusion (Ho et al. 2020): abar_t falls from 1 at t = 0 to about 0 at t = T = 1000.
    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                q_sample
    loss   = mean |model(x_t, t, text, mask) - target|^2            diffusion_loss
    target = eps, x_0, or sqrt(abar_t) eps - sqrt(1 - abar_t) x_0   target_of; "v" is the last
    guided = uncond + w (cond - uncond)                             cfg_denoiser; w = 1: no guidance

Shapes: images x (B, C, S, S); patches (B, N, D) with N = (S / patch)^2; text features
(B, L, text_dim); token mask (B, L), True on real tokens; t (B,) in 1..T.

    python uvit_fusion.py --train             # toy world, two cores: 10 to 30 min, 88 % right
    python uvit_fusion.py --train --quick     # simple scenes: half right in one to four minutes
    python uvit_fusion.py --train --data my_images --clip words --out runs/mine
    torchrun --nproc_per_node 4 uvit_fusion.py --train --preset coco --data path/to/coco \
        --autoencoder autoencoder_kl.pth --out runs/coco256

Differs from the paper (the released value in brackets; docs/uvit_fusion.md says why):
 1. Preset toy: 24 x 24 pixels, patch 4, width 128, depth 4, v = 1, c = 1 [32 x 32 latents, patch 2,
    512, 12, v = 3, c = 3]. Preset coco has the released values, except for 5 and 6; deep (depth 6,
    v = 2, c = 2) has enough outer blocks to compare early and intermediate fusion.
 2. toy predicts x_0 with a cosine schedule and favours noisy t, most strongly at first [eps, Stable
    Diffusion's schedule, uniform t]: relations are decided where almost all is noise.
 3. toy trains the matrices of the blocks and the layer that reads the text with Muon [AdamW 2e-4];
    blocks begin as the identity, and positions stand out in noise [truncated normal, 0.02].
 4. toy hides the caption's padding [attended to].
 5. toy samples by ancestral DDPM in 25 steps, coco by DPM-Solver++ 2M [order 3, 50 evaluations].
 6. Alignment is graded exactly by a judge [FID and CLIP score].
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import autoencoder
import common
import encoders
import image_data
import toy
from common import UserError
from toy.validation import Validation, report


@dataclass
class Config:
    # the image and the text
    size: int = 24  # S, side of the image (or latent) that the network sees
    channels: int = 3  # C, 3 for pixels, 4 for latents
    autoencoder: str = ""  # file or folder of the Stable Diffusion autoencoder; default: pixels
    latent_scale: float = 0.23010  # latents are multiplied by this; U-ViT's value on MS-COCO
    # width and number of the text features: no flags, the text encoder sets them
    text_dim: int = 128
    text_length: int = 20
    mask_text: bool = True  # hide the caption's padding (published U-ViT: attended to)
    # the network
    patch: int = 4  # side of a patch
    dim: int = 128  # D, width
    depth: int = 4  # depth / 2 blocks in, one in the middle, depth / 2 out
    heads: int = 8  # attention heads
    fusion: Literal["concat", "cross"] = "concat"  # how the text joins
    image_blocks: int = 1  # v, blocks at each end that see only the image
    caption_blocks: int = 1  # c, blocks that see only the caption (early fusion: v = c = 0)
    init: str = "fan_in"  # fan_in (blocks begin as the identity), published, or a file of weights
    # the diffusion
    schedule: Literal["cosine", "linear"] = "cosine"  # linear is Stable Diffusion's
    target: Literal["eps", "v", "x0"] = "x0"  # what the network predicts
    clip_x0: bool = True  # keep predicted images within [-1, 1]: for pixels, not for latents
    # the training
    batch_size: int = 64  # images per step
    steps: int = 2800  # training steps
    time_power: float = 0.3  # t = T u^power, u uniform: below 1 draws more noise
    noise_first: float = 0.25  # share of the steps, at the start, in which time_power rises from 0
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the matrices of the blocks
    lr: float = 1e-3  # highest learning rate of AdamW
    muon_lr: float = 0.01  # highest learning rate of Muon
    muon_text: bool = True  # use Muon also for the layer that reads the text features
    warmup: int = 200  # steps of linear warm-up
    decay: float = 1.0  # share of the steps, at the end, in which the rate falls to 0 (cosine)
    weight_decay: float = 0.03  # of both optimizers, on every parameter
    betas: tuple = (0.9, 0.99)  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    ema: float = 0.998  # decay of the running average of the weights
    ema_warmup: bool = True  # the average follows closely at first
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    accumulate: int = 1  # gradient accumulation: parts that a batch is split into
    recompute: bool = False  # activation checkpointing: less memory, a third more work
    seed: int = 0  # of weights, order and noise
    snapshot_at: tuple = (1400,)  # when the EMA weights are kept, for fine_rewards.py (0: never)
    # the sampling: defaults of Pipeline.generate
    guidance: float = 3.0  # w of uncond + w (cond - uncond); 1: no guidance
    guidance_interval: tuple = (0.6, 1.0)  # guide only where t / T is in this range
    sampler: Literal["ddpm", "ddim", "dpm"] = "ddpm"  # ancestral, DDIM, DPM-Solver++ 2M
    # the data
    data: str = "shapes"  # shapes, simple (toy worlds), or a folder: MS-COCO, .txt beside images
    clip: str = "runs/toy/clip"  # CLIP, T5, BERT: a folder or name on the hub; words: learned here
    # no flag: tells sample.py how to load a run
    method: str = "uvit_fusion"

    def __post_init__(self):
        if self.autoencoder and self.clip_x0:
            raise UserError("--autoencoder: latents exceed [-1, 1]: the network must be trained "
                            "with --no-clip-x0")
        common.check_bounds(
            self, channels=(1, 1000), patch=(1, 10**6), dim=(2, 10**6), depth=(0, 1000),
            caption_blocks=(0, 1000), accumulate=(1, 2**20), latent_scale=(1e-6, 1e6),
            noise_first=(0, 1))
        if self.size < 1 or self.size % self.patch:
            raise UserError(f"--size {self.size} is not a multiple of --patch {self.patch}")
        if self.dim % self.heads or self.dim % 2:
            raise UserError(f"--dim {self.dim} must be even and a multiple of --heads {self.heads}")
        if self.depth % 2 or not 0 <= self.image_blocks <= self.depth // 2:
            raise UserError(f"--depth {self.depth} must be even, and --image-blocks "
                            f"{self.image_blocks} at most half of it")
        check_interval(self.guidance_interval)
        if self.batch_size % self.accumulate:
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --accumulate "
                            f"{self.accumulate}")

    def muon_names(self):
        """Parts of the names of the parameters whose matrices Muon trains."""
        return ("block", "context_embed") if self.muon_text else ("block",)


DEEP = dict(depth=6, heads=4, image_blocks=2, caption_blocks=2, muon_text=False, noise_first=0.0)
PRESETS = {
    "toy": {},
    # enough outer blocks to compare fusions; also the base of the docs' ablations
    "deep": dict(DEEP, steps=3500, snapshot_at=(2000,)),
    # --quick: scenes of one group, with shapes on a 3 x 3 grid, one patch per cell
    "quick": dict(data="simple", size=15, patch=5, muon_lr=0.02, noise_first=0.0, clip="words"),
    # Your own images. At low noise the network must copy what it sees; until it has learned to,
    # sampling drifts to black or white. time_power=1 shows low noise more often.
    # Deep, since the settings were chosen with that network.
    "pictures": dict(DEEP, size=32, time_power=1.0, steps=20_000, decay=0.2, snapshot_at=(0,),
                     sampler="dpm"),
    # U-ViT-S/2 on MS-COCO as published, with the fusion of this paper's released code
    "coco": dict(
        size=32, channels=4, text_dim=768, text_length=77, mask_text=False,
        patch=2, dim=512, depth=12, heads=8, image_blocks=3, caption_blocks=3, init="published",
        schedule="linear", target="eps", clip_x0=False,
        batch_size=256, steps=1_000_000, time_power=1.0, noise_first=0.0,
        optimizer="adamw", lr=2e-4, warmup=5000, decay=0.0, weight_decay=0.03, betas=(0.9, 0.9),
        grad_clip=0.0, ema=0.9999, ema_warmup=False, snapshot_at=(0,),
        guidance=2.0, guidance_interval=(0.0, 1.0), sampler="dpm",
        data="coco", clip="openai/clip-vit-large-patch14",
    ),
}
# what --quick changes on top of its preset: quick or, with data of your own, pictures
QUICK = dict(out="runs/quick", samples=512, validation_samples=0, steps=800, warmup=80,
             snapshot_at=(0,))


# --------------------------------------------------------------------------------------- attention
def softmax_attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v, written out.

    q (B, H, Q, d); k, v (B, H, K, d); bias broadcasts to (B, H, Q, K). Returns (B, H, Q, d).
    The softmax is in fp32: a CPU takes longer in bf16.
    """
    # scaling q is cheaper than scaling the logits
    logits = (q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.float().softmax(-1).to(v.dtype) @ v


def attention(q, k, v, bias=None):
    """The same, by PyTorch's fused kernel where that is faster; it never stores the logits.

    Forward and backward of (64, 4, 57, 32) on two cores of a Xeon: the kernel takes 30.6 ms in bf16
    and 5.4 in fp32, `softmax_attention` 5.1 and 6.2.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return softmax_attention(q, k, v, bias)
    if bias is not None:
        bias = bias.to(q.dtype)                                  # the kernel wants one dtype
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    """Multi-head attention of x (B, Q, D) to itself, or to [x, context]."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)           # rows: (q, k, v) x heads x d
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context=None, bias=None, logits=None):
        """context (B, K - Q, D) provides keys and values only. Returns (B, Q, D).

        logits: a list that receives q k^T / sqrt(d) + bias, (B, H, Q, K) in float32.
        """
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            w_q, w_kv = self.qkv.weight.split([dim, 2 * dim])
            q = F.linear(x, w_q)                                                      # (B, Q, D)
            k, v = F.linear(torch.cat([x, context], dim=1), w_kv).chunk(2, dim=-1)    # (B, K, D)
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        k = rearrange(k, "b n (h d) -> b h n d", h=self.heads)
        v = rearrange(v, "b n (h d) -> b h n d", h=self.heads)
        if logits is not None:                                   # the fused kernel returns none
            qk = (q @ k.transpose(-2, -1)).float() * q.shape[-1]**-0.5
            logits.append(qk if bias is None else qk + bias)
        return self.proj(rearrange(attention(q, k, v, bias), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; with `skip`, it takes in a long skip first.

    hidden: width of the MLP's hidden layer (default 4 D).
    """
    def __init__(self, dim, heads, skip=False, hidden=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden or 4 * dim)
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x, skip=None, context=None, bias=None, logits=None):
        """x, skip (B, Q, D) -> (B, Q, D); the rest as in `Attention`."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if context is not None:
            context = self.norm1(context)
        x = x + self.attn(self.norm1(x), context, bias, logits)
        return x + self.mlp(self.norm2(x))


def padding_bias(mask, before=0, after=0):
    """A token mask (B, L) as a bias on logits, -inf on padding: (B, 1, 1, before + L + after).

    before, after: number of keys around the text, which are never hidden.
    """
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    return F.pad(bias, (before, after))[:, None, None]


def init_linear(model, std=None):
    """Truncated normal weights and zero biases in all linear layers.

    std: of the weights; None: 1 / sqrt(fan-in), which preserves the variance of the activations.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std or module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_fan_in(model):
    """Initial weights for any model of `Block`s, which begin as the identity.

    With such blocks all four seeds learned relations; without them only one of two.
    """
    init_linear(model)
    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.attn.proj.weight)
            nn.init.zeros_(module.mlp.fc2.weight)


# ------------------------------------------------------------------------------------------- U-ViT
def unpatchify(tokens, p):
    """Patches of p x p pixels to images: (B, N, p p C) -> (B, C, S, S)."""
    side = math.isqrt(tokens.shape[1])
    return rearrange(tokens, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=side, p1=p, p2=p)


def timestep_embedding(t, dim):
    """Sinusoids of the timestep, cat(cos, sin): t (B,) -> (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UViT(nn.Module):
    """A U-ViT with early or intermediate fusion, by concatenation or by cross-attention."""
    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        self.cross = cfg.fusion == "cross"
        self.mask_text = cfg.mask_text
        self.recompute = cfg.recompute
        self.length = cfg.text_length
        half = cfg.depth // 2
        self.image_blocks = cfg.image_blocks                         # at either end
        self.joint_blocks = cfg.depth + 1 - 2 * cfg.image_blocks
        patches = (cfg.size // cfg.patch)**2
        # the names of the modules are those of the published U-ViT
        conv = nn.Conv2d(cfg.channels, cfg.dim, cfg.patch, stride=cfg.patch)
        self.patch_embed = nn.ModuleDict({"proj": conv})
        self.context_embed = nn.Linear(cfg.text_dim, cfg.dim)
        # for [time, text, patches], in this order in all variants
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.length + patches, cfg.dim))
        self.in_blocks = nn.ModuleList(Block(cfg.dim, cfg.heads) for _ in range(half))
        self.mid_block = Block(cfg.dim, cfg.heads)
        self.out_blocks = nn.ModuleList(Block(cfg.dim, cfg.heads, skip=True) for _ in range(half))
        self.caption_blocks = nn.ModuleList(
            Block(cfg.dim, cfg.heads) for _ in range(cfg.caption_blocks))
        self.norm = nn.LayerNorm(cfg.dim)
        self.decoder_pred = nn.Linear(cfg.dim, cfg.patch**2 * cfg.channels)
        self.final_layer = nn.Conv2d(cfg.channels, cfg.channels, 3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if cfg.init == "fan_in":
            init_fan_in(self)
            # at high noise, where relations are decided, a position must stand out from its patch
            nn.init.normal_(self.pos_embed, std=1.0)
            self.patch_embed["proj"].weight.data.mul_(0.3)
        else:
            init_linear(self, std=0.02)                              # as published

    def run_block(self, block, x, skip=None, context=None, bias=None, logits=None):
        """Runs a block; with cfg.recompute the backward pass recomputes its activations."""
        # not with `logits`, which would be appended twice
        if self.recompute and torch.is_grad_enabled() and logits is None:
            return checkpoint(block, x, skip, context, bias, use_reentrant=False)
        return block(x, skip, context, bias, logits)

    def encode_text(self, text, mask):
        """text (B, L, text_dim), mask (B, L) -> caption tokens (B, L, D).

        They depend on neither t nor x_t: when sampling, once per prompt is enough.
        """
        y = self.context_embed(text)
        y = y + self.pos_embed[:, 1:1 + self.length].to(y.dtype)      # bf16 stays bf16: see `embed`
        bias = padding_bias(mask) if self.mask_text else None
        for block in self.caption_blocks:
            y = self.run_block(block, y, bias=bias)
        return y

    def embed(self, x, t):
        """x (B, C, S, S), t (B,) -> tokens [time, patches], (B, 1 + N, D)."""
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)                     # (B, N, D)
        # Under autocast x is bf16. fp32 positions would turn all tokens into fp32 and make each
        # linear layer convert them back: a training step took 5 % longer, sampling a third.
        positions = self.pos_embed.to(x.dtype)
        x = x + positions[:, 1 + self.length:]
        time_token = timestep_embedding(t, x.shape[-1]).to(x.dtype)[:, None] + positions[:, :1]
        return torch.cat([time_token, x], dim=1)

    def denoise(self, x, t, y, mask, return_logits=False):
        """x (B, C, S, S), t (B,), caption tokens y (B, L, D), mask (B, L) -> (B, C, S, S).

        y, mask and the result may have k B rows: the first captions of all images, then the second
        ones, and so on. The blocks before the join see no caption, and run once for all k.
        return_logits: also return a list of the attention logits of each joint block, (B, H, Q, K).
        """
        x = self.embed(x, t)                                                       # (B, 1 + N, D)
        patches = x.shape[1] - 1
        length = y.shape[1]
        context = y if self.cross else None
        if not self.mask_text:
            bias = None
        elif self.cross:                                          # keys: [time, patches, text]
            bias = padding_bias(mask, before=1 + patches)
        else:                                                     # keys: [time, text, patches]
            bias = padding_bias(mask, before=1, after=patches)
        logits = [] if return_logits else None
        skips = []
        for block in self.in_blocks[:self.image_blocks]:          # image only
            x = self.run_block(block, x)
            skips.append(x)
        copies = len(y) // len(x)
        if copies > 1:
            x = x.repeat(copies, 1, 1)
            skips = [skip.repeat(copies, 1, 1) for skip in skips]
        if not self.cross:                                        # join
            x = torch.cat([x[:, :1], y, x[:, 1:]], dim=1)
        for block in self.in_blocks[self.image_blocks:]:          # joint
            x = self.run_block(block, x, None, context, bias, logits)
            skips.append(x)
        x = self.run_block(self.mid_block, x, None, context, bias, logits)
        n_joint = len(self.out_blocks) - self.image_blocks
        for block in self.out_blocks[:n_joint]:                   # joint, with long skips
            x = self.run_block(block, x, skips.pop(), context, bias, logits)
        if not self.cross:                                        # drop text
            x = torch.cat([x[:, :1], x[:, 1 + length:]], dim=1)
        for block in self.out_blocks[n_joint:]:                   # image only, with long skips
            x = self.run_block(block, x, skips.pop())
        tokens = self.decoder_pred(self.norm(x[:, 1:]))           # of the patches, not of time
        out = self.final_layer(unpatchify(tokens, self.patch))
        return (out, logits) if return_logits else out

    def forward(self, x, t, text, mask):
        """x (B, C, S, S), t (B,), text (B, L, text_dim), mask (B, L) -> (B, C, S, S)."""
        return self.denoise(x, t, self.encode_text(text, mask), mask)


# --------------------------------------------------------------------------------------- diffusion
class Diffusion:
    """Noise schedule and samplers. `abar` has T + 1 entries, abar[0] = 1: no noise."""
    T = 1000

    def __init__(self, schedule="linear", target="eps", clip_x0=False):
        self.target = target
        self.clip_x0 = clip_x0
        if schedule == "linear":
            # Stable Diffusion's: sqrt(beta) is linear, not beta
            beta = torch.linspace(0.00085**0.5, 0.0120**0.5, self.T, dtype=torch.float64)**2
        else:
            # Nichol and Dhariwal 2021, eq. 17
            u = torch.arange(self.T + 1, dtype=torch.float64) / self.T
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2)**2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)         # abar_T stays above 0
        one = torch.ones(1, dtype=torch.float64)
        self.abar = torch.cat([one, (1 - beta).cumprod(0)])      # on the CPU: MPS has no float64
        self.tables = {}

    def scales(self, t, like):
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1), in dtype and device of `like`."""
        key = (like.device, like.dtype)
        if key not in self.tables:                               # copied once: GPUs wait for copies
            table = torch.stack([self.abar.sqrt(), (1 - self.abar).sqrt()])
            self.tables[key] = table.to(like.dtype).to(like.device)
        return self.tables[key][:, t].view(2, -1, 1, 1, 1).unbind()

    def sample_timesteps(self, n, power, device):
        """t = T u^power in 1..T, u uniform: (n,)."""
        u = torch.rand(n, device=device)
        return 1 + (self.T * u**power).long().clamp(max=self.T - 1)

    def q_sample(self, x_0, t, eps):
        sqrt_abar, sqrt_one_minus_abar = self.scales(t, x_0)
        return sqrt_abar * x_0 + sqrt_one_minus_abar * eps       # Ho et al. 2020, eq. 4

    def target_of(self, x_0, t, eps):
        """What the network should predict, (B, C, S, S)."""
        sqrt_abar, sqrt_one_minus_abar = self.scales(t, x_0)
        if self.target == "eps":
            return eps
        if self.target == "v":                                   # Salimans and Ho 2022
            return sqrt_abar * eps - sqrt_one_minus_abar * x_0
        return x_0

    def predict(self, output, x_t, t):
        """(x_0, eps) that an output of the network stands for."""
        sqrt_abar, sqrt_one_minus_abar = self.scales(t, x_t)
        if self.target == "eps":
            x_0 = (x_t - sqrt_one_minus_abar * output) / sqrt_abar
        elif self.target == "v":
            x_0 = sqrt_abar * x_t - sqrt_one_minus_abar * output
        else:
            x_0 = output
        if self.clip_x0:
            x_0 = x_0.clamp(-1, 1)
        eps = (x_t - sqrt_abar * x_0) / sqrt_one_minus_abar      # fits the clipped x_0
        return x_0, eps

    def posterior(self, x_0, x_t, t, t_next):
        """Mean and variance of q(x_next | x_t, x_0), t_next < t (Ho et al. 2020, eq. 7)."""
        abar = self.abar[t]
        abar_next = self.abar[t_next]
        alpha = abar / abar_next                                 # eq. 7's alpha_t for any stride
        mean = abar_next.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - abar_next) * x_t
        mean = mean / (1 - abar)
        variance = (1 - alpha) * (1 - abar_next) / (1 - abar)
        return mean, variance

    def step_ddpm(self, x_0, x_t, t, t_next, noise):
        """Ancestral sampling: a draw from the posterior (Ho et al. 2020, algorithm 2)."""
        mean, variance = self.posterior(x_0, x_t, t, t_next)
        return mean + variance.sqrt() * noise

    def step_ddim(self, x_0, eps, t_next):
        """DDIM with eta = 0 (Song et al. 2021, eq. 12)."""
        abar = self.abar[t_next].item()
        return abar**0.5 * x_0 + (1 - abar)**0.5 * eps

    def step_dpm(self, x_0, x_t, t, t_next, previous):
        """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2); previous: (x_0, t) of the step before."""
        half_log_snr = 0.5 * (self.abar.log() - (1 - self.abar).log())            # its lambda
        h = (half_log_snr[t_next] - half_log_snr[t]).item()
        d = x_0
        if previous is not None:                                 # extrapolate to mid-step
            x_0_before, t_before = previous
            h_before = (half_log_snr[t] - half_log_snr[t_before]).item()
            d = x_0 + 0.5 * h / h_before * (x_0 - x_0_before)
        abar = self.abar[t].item()
        abar_next = self.abar[t_next].item()
        # x_next = sigma_next / sigma x_t - sqrt(abar_next) (e^-h - 1) d, sigma = sqrt(1 - abar)
        sigma_ratio = ((1 - abar_next) / (1 - abar))**0.5
        return sigma_ratio * x_t - abar_next**0.5 * math.expm1(-h) * d

    @torch.no_grad()
    def sample(self, denoiser, x, steps=25, sampler="dpm", noise=None, trajectory=None):
        """Turns noise x (B, C, S, S) into images.

        denoiser(x_t, t) -> output, already guided; noise(): fresh noise like x, for "ddpm";
        trajectory: a list that receives the predicted x_0 of every step.
        """
        if not 1 <= steps <= self.T:
            raise UserError(f"--sample-steps {steps}: expected 1 to {self.T}")
        timesteps = torch.linspace(self.T, 0, steps + 1).round().long()
        previous = None
        for t, t_next in zip(timesteps[:-1], timesteps[1:]):
            t_batch = t.expand(len(x)).to(x.device)
            output = denoiser(x, t_batch).float()
            x_0, eps = self.predict(output, x, t_batch)
            if trajectory is not None:
                trajectory.append(x_0)
            if t_next == 0:                                      # no noise is left
                return x_0
            if sampler == "ddpm":
                x = self.step_ddpm(x_0, x, t, t_next, noise())
            elif sampler == "ddim":
                x = self.step_ddim(x_0, eps, t_next)
            else:
                x = self.step_dpm(x_0, x, t, t_next, previous)
            previous = (x_0, t)


def diffusion_loss(model, diffusion, x_0, t, eps, text, mask):
    """Mean squared error of the network's prediction at x_t, a scalar; x_0, eps (B, C, S, S)."""
    x_t = diffusion.q_sample(x_0, t, eps)
    prediction = model(x_t, t, text, mask)
    return F.mse_loss(prediction.float(), diffusion.target_of(x_0, t, eps))


def drop_captions(captions, p):
    """Empties each caption with probability p, to learn guidance's uncond."""
    drop = torch.rand(len(captions)) < p
    return ["" if dropped else caption for caption, dropped in zip(captions, drop.tolist())]


def cfg_denoiser(model, text, mask, null, null_mask, w, interval=(0.0, 1.0)):
    """denoiser(x, t) with classifier-free guidance, cond and uncond in one batch.

    text (B, L, text_dim) and mask (B, L) belong to the prompts, null (1, L, text_dim) and null_mask
    to the empty (or negative) prompt. interval: guide where t / T lies in it (Kynkaanniemi et al.
    2024); elsewhere only cond is predicted, at about half the cost.
    """
    y = model.encode_text(text, mask)                            # once per prompt
    y_null = model.encode_text(null, null_mask).expand(len(text), -1, -1)
    y_both = torch.cat([y, y_null])
    mask_both = torch.cat([mask, null_mask.expand(len(text), -1)])

    def denoiser(x, t):
        low, high = interval
        if w == 1 or not low <= t[0].item() / Diffusion.T <= high:
            return model.denoise(x, t, y, mask)
        both = model.denoise(x, t, y_both, mask_both)             # two captions for each image
        cond, uncond = both.float().chunk(2)
        return uncond + w * (cond - uncond)
    return denoiser


def check_interval(interval):
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"--guidance-interval {low:g} {high:g}: both are shares of the time, "
                        "between 0 and 1, the lower one first")


# ---------------------------------------------------------------------------------------- pipeline
class ImageNoise:
    """noise() -> fresh noise (B, C, S, S).

    Each image has its own generator, on the CPU: its noise depends on neither batch nor device.
    """
    def __init__(self, cfg, seed, first, count, device):
        self.shape = (cfg.channels, cfg.size, cfg.size)
        self.device = device
        self.generators = [torch.Generator().manual_seed(seed * 10**9 + first + i)
                           for i in range(count)]

    def __call__(self):
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.device)


class Pipeline:
    """A network with all it needs to turn prompts into images."""
    def __init__(self, model, text_encoder, cfg, device, precision, vae=None):
        self.model = model
        self.text_encoder = text_encoder
        self.cfg = cfg
        self.device = device
        self.precision = precision
        self.vae = vae
        self.diffusion = Diffusion(cfg.schedule, cfg.target, cfg.clip_x0)
        self.image_size = cfg.size * (vae.factor if vae else 1)

    @torch.no_grad()
    def generate(self, prompts, steps=25, guidance=None, guidance_interval=None, sampler=None,
                 negative_prompt="", seed=0, first=0, batch_size=256, progress=False,
                 trajectory=None):
        """Images for prompts: numpy uint8 (len(prompts), H, W, 3).

        The noise of image i depends only on seed and first + i, so two models can be compared image
        by image, and a long list can be generated in parts. trajectory: an empty list to receive
        the predicted images of each step; all prompts are then one batch.
        """
        cfg = self.cfg
        guidance = cfg.guidance if guidance is None else guidance
        guidance_interval = guidance_interval or cfg.guidance_interval
        sampler = sampler or cfg.sampler
        null, null_mask = self.text_encoder([negative_prompt])
        if trajectory is not None:
            batch_size = len(prompts)
        images = []
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(starts, desc="generating", leave=False, disable=not progress):
            batch = prompts[start:start + batch_size]
            noise = ImageNoise(cfg, seed, first + start, len(batch), self.device)
            text, mask = self.text_encoder(batch)
            with common.autocast(self.device, self.precision):
                denoiser = cfg_denoiser(
                    self.model, text, mask, null, null_mask, guidance, guidance_interval)
                x_0 = self.diffusion.sample(denoiser, noise(), steps, sampler, noise, trajectory)
                images.append(self.decode(x_0))
                if trajectory is not None:
                    trajectory[:] = [self.decode(x) for x in trajectory]
        return np.concatenate(images)

    @torch.no_grad()
    def decode(self, x_0):
        """x_0 (B, C, S, S) -> images, numpy uint8 (B, H, W, 3)."""
        if self.vae is None:
            return image_data.to_uint8(x_0)
        parts = (x_0 / self.cfg.latent_scale).split(16)          # images are large: a few at a time
        return np.concatenate([image_data.to_uint8(self.vae.decode(z)) for z in parts])

    @torch.no_grad()
    def encode(self, images, sample=True):
        """What the network sees of a batch from `dataset`: x_0 (B, C, S, S).

        images: pixels, uint8 (B, 3, H, W), or the moments of latents, (B, 2, C, S, S).
        sample=False: the mean of the latents, not a draw.
        """
        images = common.to_device(images, self.device)
        if self.vae is None:
            return image_data.to_float(images)
        moments = images
        if images.ndim == 4:                                     # pixels
            parts = [self.vae.encode(image_data.to_float(part)) for part in images.split(16)]
            moments = torch.cat([torch.stack(part, dim=1) for part in parts])
        noise = torch.randn_like(moments[:, 0], dtype=torch.float32) if sample else 0
        return self.cfg.latent_scale * autoencoder.sample_latents(moments, noise)

    @torch.no_grad()
    def loss(self, dataset):
        """The loss over all images of a dataset, a scalar.

        Captions, t and noise are the same in every call and on every device, so losses can be
        compared; t has the power with which training ends.
        """
        images, captions, _ = zip(*[dataset[i, i] for i in range(len(dataset))])
        x_0 = self.encode(torch.stack(images), sample=False)
        text, mask = self.text_encoder(list(captions))
        torch.manual_seed(0)                                     # each training step sets its own
        t = self.diffusion.sample_timesteps(len(x_0), self.cfg.time_power, "cpu").to(self.device)
        eps = torch.randn(x_0.shape).to(self.device)
        with common.autocast(self.device, self.precision):
            return diffusion_loss(self.model, self.diffusion, x_0, t, eps, text, mask)

    def dataset(self, root, split, items=None):
        """The captioned images of a split; latents are computed once and kept on disk."""
        if self.vae is None:
            return image_data.CaptionedImages(root, split, self.cfg.size, items)
        return autoencoder.Latents(
            root, split, self.image_size, self.vae, device=self.device, items=items)

    def identity(self):
        """A hash of the weights of network and text encoder: an adapter fits no others."""
        return common.fingerprint(nn.ModuleList([self.model, self.text_encoder.model]))


def make_pipeline(cfg, text_encoder, tensors, name, precision):
    """The pipeline of a U-ViT with the weights `tensors`; name: their file, for messages."""
    if (text_encoder.dim, text_encoder.length) != (cfg.text_dim, cfg.text_length):
        raise UserError(
            f"{name} reads text of {cfg.text_length} tokens x {cfg.text_dim}, but {cfg.clip} gives "
            f"{text_encoder.length} x {text_encoder.dim}: restore its own text encoder")
    device = text_encoder.device
    model = UViT(cfg).to(device).eval().requires_grad_(False)
    common.load_into(model, tensors, name)
    vae = autoencoder.load_for(cfg, device)
    return Pipeline(model, text_encoder, cfg, device, precision, vae)


def load_pipeline(path, device, precision, **changes):
    """The pipeline of a run folder, or of a .safetensors file in one; changes: to its settings.

    A run of another method that holds a whole U-ViT has the U-ViT's settings in uvit.json.
    """
    folder, weights = common.run_files(path)
    if not weights.is_file():
        raise UserError(f"there is no {weights}: train it first: python uvit_fusion.py --train")
    name = "uvit.json" if (folder / "uvit.json").exists() else "config.json"
    cfg = dataclasses.replace(common.read_config(Config, folder, name), **changes)
    tensors = common.read_weights(weights, f"checkpoint {weights}")
    return make_pipeline(cfg, encoders.TextEncoder(cfg.clip, device), tensors, weights, precision)


# ---------------------------------------------------------------------------------------- training
def learning_rate(cfg, step):
    """Share of the highest rate at step 1, 2, ...: warm-up, constant, cosine to zero."""
    share = min(1, step / max(1, cfg.warmup))
    begin = cfg.steps * (1 - cfg.decay)
    if step > begin:
        share *= 0.5 * (1 + math.cos(math.pi * (step - begin) / (cfg.steps - begin)))
    return share


def set_learning_rate(optimizers, cfg, step):
    """optimizers: AdamW and perhaps Muon, as `make_optimizers` returns them."""
    for optimizer, highest in zip(optimizers, (cfg.lr, cfg.muon_lr)):
        for group in optimizer.param_groups:
            group["lr"] = highest * learning_rate(cfg, step)


def make_optimizers(model, cfg, precision, muon_names=("block",)):
    """[AdamW], or [AdamW, Muon] (Jordan et al. 2024) with cfg.optimizer "muon".

    Muon then trains the matrices whose name contains one of `muon_names`, AdamW the rest. Muon's
    steps are equally large in all directions of a matrix, even those of small gradient: after 600
    steps it had learned relations at high noise; AdamW had learned none.
    precision: of Muon's matrix products.
    """
    matrices = []
    rest = []
    for name, parameter in model.named_parameters():
        is_named = any(part in name for part in muon_names)
        if cfg.optimizer == "muon" and parameter.ndim == 2 and is_named:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    optimizers = [torch.optim.AdamW(
        rest, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        optimizers.append(common.Muon(
            matrices, precision, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


@torch.no_grad()
def update_ema(ema, parameters, decay):
    """ema = decay ema + (1 - decay) parameters, in place: lists of tensors."""
    # one call for all tensors, not one for each
    torch._foreach_lerp_(ema, parameters, 1 - decay)


def init_from_file(model, path):
    """Loads weights of another run or of the published U-ViT, which lacks the caption blocks."""
    tensors = common.read_weights(path, f"--init {path}")
    new = {name: tensor for name, tensor in model.state_dict().items()
           if name.startswith("caption_blocks.")}
    common.load_into(model, new | tensors, path)


def join_processes(cfg):
    """Rank and number of processes under torchrun, one per GPU; without it, 0 and 1."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return 0, 1
    if cfg.batch_size % (world_size * cfg.accumulate):
        raise UserError(f"--batch-size {cfg.batch_size} cannot be split over {world_size} "
                        f"processes x --accumulate {cfg.accumulate}")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    # rank 0 may prepare data for hours, while the others wait
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=24))
    return rank, world_size


@contextlib.contextmanager
def rank_0_first(rank, world_size):
    """Rank 0 runs the block first, the others after it: they find its results on disk."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world_size > 1:
        dist.barrier()


def compile_network(network, device):
    """torch.compile of a module or function, or `network` itself where that does not work."""
    try:
        # a small layer tells within seconds whether there is a compiler
        torch.compile(nn.Linear(8, 8).to(device))(torch.zeros(1, 8, device=device))
        # with symbolic sizes a second network in one process failed in PyTorch 2.11
        return torch.compile(network, dynamic=False)
    except Exception as error:                                   # compilers fail in many ways
        print(f"torch.compile does not work here, continuing without it ({common.say_why(error)})")
        return network


def capture_graph(model, cfg, device, precision):
    """Makes a U-ViT's forward and backward pass one CUDA graph each, in place.

    A graph launches all its kernels at once, and is captured in a tenth of a second. Each call
    overwrites the last one's output and gradients.
    """
    x = torch.zeros(cfg.batch_size, cfg.channels, cfg.size, cfg.size, device=device)
    t = torch.ones(cfg.batch_size, dtype=torch.long, device=device)
    text = torch.zeros(cfg.batch_size, cfg.text_length, cfg.text_dim, device=device)
    mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    # gradients come from another stream than in the capture: a moment's wait, no error
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    # autocast must not cache bf16 weights: replays would use those of the capture
    autocast = torch.autocast(
        "cuda", torch.bfloat16, precision == torch.bfloat16, cache_enabled=False)
    with common.reading("the network as a CUDA graph", "train with --no-compile"), autocast:
        return torch.cuda.make_graphed_callables(model, (x, t, text, mask))


def prepare_network(model, cfg, device, precision, wanted):
    """`model` as `train` calls it, with the same weights: compiled, or on a GPU a CUDA graph.

    wanted: whether to compile; None: what is fastest; False: neither, so that print works in it.
    """
    on_gpu = device.type == "cuda"
    # in a wide network kernels take longer to run than to launch: it gains more by compiling;
    # a graph can neither add to the gradients of an earlier part nor run DDP's hooks
    suits_graph = (on_gpu and cfg.dim < 256 and cfg.accumulate == 1 and not cfg.recompute
                   and not dist.is_initialized())
    if wanted is None and suits_graph:
        return capture_graph(model, cfg, device, precision)
    if wanted or (wanted is None and on_gpu):
        return compile_network(model, device)
    return model


def time_power(cfg, step):
    """The power of `Diffusion.sample_timesteps` at step 1, 2, ...

    It rises from 0, where t = T. Relations are decided at high noise and learned suddenly: after
    600 steps a run with rising power had learned them, one with constant power had not.
    """
    return cfg.time_power * min(1, step / max(1, cfg.noise_first * cfg.steps))


def backward(network, pipeline, x_0, text, mask, power):
    """Draws t and noise for a batch and accumulates the gradients of its loss; returns the loss.

    network: the U-ViT being trained, perhaps compiled (pipeline.model is its average). x_0 (B, C,
    S, S), text (B, L, text_dim), mask (B, L); split into cfg.accumulate parts to save memory.
    power: from `time_power`.
    """
    cfg = pipeline.cfg
    t = pipeline.diffusion.sample_timesteps(len(x_0), power, pipeline.device)
    eps = torch.randn_like(x_0)
    losses = []
    rows = len(x_0) // cfg.accumulate
    for first in range(0, len(x_0), rows):
        part = slice(first, first + rows)
        with common.autocast(pipeline.device, pipeline.precision):
            loss = diffusion_loss(network, pipeline.diffusion, x_0[part], t[part], eps[part],
                                  text[part], mask[part])
        (loss / cfg.accumulate).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def train(cfg, data, folder, args, device, precision, rank=0, world_size=1):
    """Trains a U-ViT on the captioned images in `data`; returns a pipeline with its EMA weights.

    args: those of `main`, for resume, overwrite, workers, compile and validation_samples.
    """
    text_encoder = encoders.TextEncoder(cfg.clip, device)
    cfg = dataclasses.replace(cfg, text_dim=text_encoder.dim, text_length=text_encoder.length)
    vae = autoencoder.load_for(cfg, device)
    torch.manual_seed(cfg.seed)
    model = UViT(cfg).to(device)
    if cfg.init not in ("fan_in", "published"):
        init_from_file(model, cfg.init)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # listed once: to walk through the modules takes a millisecond a step
    parameters = list(model.parameters())
    ema_parameters = list(ema.parameters())
    optimizers = make_optimizers(model, cfg, precision, cfg.muon_names())
    pipeline = Pipeline(ema, text_encoder, cfg, device, precision, vae)
    # first, since it reads the data: bad ones fail here, not after hours of encoding
    validation = Validation(pipeline, data, folder, args.validation_samples)
    with rank_0_first(rank, world_size):
        dataset = pipeline.dataset(data, "train")                # it may compute latents
    run = common.Run(folder, cfg, [model, ema, *optimizers], ema.state_dict(), args, precision,
                     title=cfg.fusion, rank=rank, dataset=dataset)
    network = prepare_network(model, cfg, device, precision, args.compile)
    if world_size > 1:
        network = nn.parallel.DistributedDataParallel(network)
    loader = image_data.batches(dataset, cfg.batch_size, run.start, cfg.steps, cfg.seed,
                                args.workers, rank, world_size)
    validation.start_clock()
    if run.start < cfg.steps:
        every_caption = [caption for _, texts, _ in dataset.items for caption in texts]
        text_encoder.keep(every_caption, progress=rank == 0)
    for step, (images, captions) in enumerate(loader, run.start + 1):
        # step n depends on n alone: a resumed run equals an uninterrupted one
        torch.manual_seed(cfg.seed * 10**9 + step * world_size + rank)
        set_learning_rate(optimizers, cfg, step)
        x_0 = pipeline.encode(images)                                            # (B, C, S, S)
        text, mask = text_encoder(drop_captions(captions, cfg.caption_dropout))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = backward(network, pipeline, x_0, text, mask, time_power(cfg, step))
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(cfg.ema, step / (step + 10)) if cfg.ema_warmup else cfg.ema
        update_ema(ema_parameters, parameters, decay)
        measured = validation.at(step) if rank == 0 else {}
        run.log(step, loss=loss, **measured)
        if step in cfg.snapshot_at and rank == 0:
            common.save_tensors(ema.state_dict(), Path(folder) / f"step{step}.safetensors")
        if run.due(step):
            run.save(step)
    if rank == 0 and run.start == 0:                             # a resumed run is timed in part
        validation.report_speed()
    return pipeline


# -------------------------------------------------------------------------------------------- main
def add_flags(parser):
    parser.add_argument("--train", action="store_true",
                        help="train, generate validation images and, on the toy world, grade them")
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out captions to grade (default %(default)s)")
    parser.add_argument("--validation-samples", type=common.natural, default=512,
                        help="others, graded ten times during training (default %(default)s)")
    parser.add_argument("--workers", type=common.natural, help="processes that read images")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile, which needs a C++ compiler (default: on a GPU, if "
                             "--dim is 256 or more; below, a CUDA graph; --no-compile: neither)")
    common.add_training_flags(parser, "run folder (default runs/uvit_fusion)", QUICK)
    common.add_config_flags(parser, Config, PRESETS)


def main():
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    args = common.parse_args(parser, QUICK)
    if not args.train:
        parser.print_help()
        return
    cfg = common.make_config(Config, PRESETS, args)
    folder = args.out or "runs/uvit_fusion"
    rank, world_size = join_processes(cfg)
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    if rank == 0:
        common.check_run(folder, args)
        print(f"{cfg.steps} steps of {cfg.batch_size} images on {device} x {world_size} "
              f"in {str(precision).removeprefix('torch.')}, into {folder}/")
    size = cfg.size * (8 if cfg.autoencoder else 1)              # 8 x 8 pixels make a latent
    with rank_0_first(rank, world_size):
        data = toy.prepare(cfg.data, cfg.clip, size)
        if cfg.clip == "words":
            cfg.clip = toy.models.train_words(data, size, folder, keep=args.resume or rank > 0)
    pipeline = train(cfg, data, folder, args, device, precision, rank, world_size)
    if rank == 0:
        report(pipeline, data, folder, args.samples, begin)


if __name__ == "__main__":
    common.entry(main)
