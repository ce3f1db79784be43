"""Stable Diffusion's autoencoder (Rombach et al. 2022, arXiv 2112.10752), and a cache of latents.

The idea. Most numbers in an image are fine detail that no caption mentions. So an encoder
compresses the image into a latent that is 8 times smaller on each side, and a decoder turns a
latent back into an image. A diffusion model of latents has 48 times fewer numbers to generate.
The encoder gives a normal distribution; every use of an image takes a new sample from it:

    mean, logvar = encode(x)               x (B, 3, S, S) in [-1, 1] -> each (B, 4, S/8, S/8)
    z = mean + exp(logvar / 2) noise       sample_latents
    x = decode(z)                          z (B, 4, S/8, S/8) -> (B, 3, S, S)

Both networks are convolutions, one the mirror image of the other. What each level gives, channels
x side^2, for an image of 256 pixels:

    encoder  3 -> 128 x 256^2 -> 256 x 128^2 -> 512 x 64^2 -> 512 x 32^2 -> middle -> 2 * 4 x 32^2
    decoder  4 -> middle -> 512 x 32^2 -> 512 x 64^2 -> 256 x 128^2 -> 128 x 256^2 -> 3

The published weights are used as they are; nothing is trained here. One CPU core takes 3.3 s to
encode such an image and 6.3 s to decode it. So the latents of a data set are computed once and
kept (`Latents`): 16 kB an image, 1.4 GB for COCO 2014. A diffusion model multiplies z by a scale of
its own (U-ViT on COCO: 0.23010), which is one of its settings and does not appear in this file.
"""
import hashlib
import math
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import common
import image_data
from common import UserError


# -------------------------------------------------------------------------------- the networks
def group_norm(dim):
    return nn.GroupNorm(32, dim, eps=1e-6)


def conv(dim_in, dim_out):
    return nn.Conv2d(dim_in, dim_out, 3, padding=1)


def named(**modules):
    """Modules one after the other, each under its published name."""
    return nn.Sequential(OrderedDict(modules))


class ResidualBlock(nn.Module):
    """(B, dim_in, H, W) -> (B, dim_out, H, W)"""
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.norm1 = group_norm(dim_in)
        self.conv1 = conv(dim_in, dim_out)
        self.norm2 = group_norm(dim_out)
        self.conv2 = conv(dim_out, dim_out)
        self.nin_shortcut = nn.Identity() if dim_in == dim_out else nn.Conv2d(dim_in, dim_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention of all positions, with one head; 1 x 1 convolutions are its linear layers."""
    def __init__(self, dim):
        super().__init__()
        self.norm = group_norm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.k = nn.Conv2d(dim, dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        h = self.norm(x)
        q = rearrange(self.q(h), "b c h w -> b 1 (h w) c")
        k = rearrange(self.k(h), "b c h w -> b 1 (h w) c")
        v = rearrange(self.v(h), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(q, k, v)      # softmax(q k^T / sqrt(C)) v, (B, 1, N, C)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))         # right and bottom only, as published


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)"""
    def __init__(self, dim):
        super().__init__()
        self.conv = conv(dim, dim)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(dim_in, dim_out, blocks):
    """The residual blocks of one resolution."""
    residual = [ResidualBlock(dim_out if i else dim_in, dim_out) for i in range(blocks)]
    return named(block=nn.Sequential(*residual))


def middle(dim):
    return named(block_1=ResidualBlock(dim, dim), attn_1=Attention(dim),
                 block_2=ResidualBlock(dim, dim))


def make_encoder(dims, blocks, channels):
    """x (B, 3, S, S) -> mean and log-variance in one tensor, (B, 2 C, S/f, S/f)"""
    down = nn.Sequential()                               # down[0] is full resolution
    for i, dim in enumerate(dims):
        down.append(level(dims[max(i - 1, 0)], dim, blocks))
        if i < len(dims) - 1:
            down[i].add_module("downsample", Downsample(dim))
    return named(conv_in=conv(3, dims[0]), down=down, mid=middle(dims[-1]),
                 norm_out=group_norm(dims[-1]), silu=nn.SiLU(),
                 conv_out=conv(dims[-1], 2 * channels))


def make_decoder(dims, blocks, channels):
    """z (B, C, S/f, S/f) -> x (B, 3, S, S)"""
    up = nn.Sequential()                                 # the last one, full resolution, is up.0
    for i in reversed(range(len(dims))):
        dim_in = dims[min(i + 1, len(dims) - 1)]
        up.add_module(str(i), level(dim_in, dims[i], blocks + 1))
        if i > 0:
            up[-1].add_module("upsample", Upsample(dims[i]))
    return named(conv_in=conv(channels, dims[-1]), mid=middle(dims[-1]), up=up,
                 norm_out=group_norm(dims[0]), silu=nn.SiLU(), conv_out=conv(dims[0], 3))


class Autoencoder(nn.Module):
    """Encoder and decoder; the parameters have the names of the published files (CompVis).

    dims: width at each resolution, the full one first, all multiples of 32 (the groups of the
    norms); blocks: residual blocks at each resolution, the decoder has one more; channels: C of the
    latent. `factor` is f: a latent is f times smaller than its image on each side.
    """
    def __init__(self, dims=(128, 256, 512, 512), blocks=2, channels=4):
        super().__init__()
        self.factor = 2**(len(dims) - 1)
        self.channels = channels
        self.encoder = make_encoder(dims, blocks, channels)
        self.decoder = make_decoder(dims, blocks, channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, x):
        """x (B, 3, S, S) in [-1, 1], S a multiple of f -> mean, logvar, each (B, C, S/f, S/f)"""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, C, S/f, S/f), as encoded (unscaled) -> images (B, 3, S, S), roughly in [-1, 1]"""
        return self.decoder(self.post_quant_conv(z))


def sample_latents(moments, noise):
    """moments (B, 2, C, s, s), noise (B, C, s, s) -> z = mean + exp(logvar / 2) noise, float32"""
    mean, logvar = moments.float().unbind(1)
    return mean + (logvar / 2).exp() * noise


# ---------------------------------------------------------------------------- published weights
EXPECTED = ("expected Stable Diffusion's autoencoder: autoencoder_kl.pth of U-ViT, a whole Stable "
            "Diffusion file, or a diffusers folder with diffusion_pytorch_model.safetensors")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
RENAMED = {                                              # diffusers -> CompVis
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.", "down_blocks.": "down.", "resnets.": "block.",
    "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.", "group_norm.": "norm.",
    "conv_shortcut.": "nin_shortcut.", "conv_norm_out.": "norm_out.",
    ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out.",
    ".query.": ".q.", ".key.": ".k.", ".value.": ".v.", ".proj_attn.": ".proj_out.",  # until 2023
}


def convert_keys(tensors):
    """{name: tensor} of CompVis or diffusers -> CompVis's names; other tensors are dropped.

    A whole Stable Diffusion file prefixes them with `first_stage_model.`. Diffusers counts the
    decoder's levels from the lowest resolution; its attention weights are (C, C), not (C, C, 1, 1).
    """
    tensors = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PARTS)}
    levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")})
    converted = {}
    for name, tensor in tensors.items():
        if found := re.match(r"decoder\.up_blocks\.(\d+)\.", name):
            name = f"decoder.up.{levels - 1 - int(found[1])}.{name[found.end():]}"
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        converted[name] = tensor
    return converted


def load(path, device="cpu"):
    """Loads a frozen autoencoder, in float32; its sizes are read from the tensors.

    path: a file of weights, or a diffusers folder (its own, or a whole model's, with vae/ in it).
    Raises UserError for a missing or damaged file and for tensors of another model.
    """
    flag = f"--autoencoder {path}"
    file = Path(path)
    if file.is_dir():
        folder = file / "vae" if (file / "vae").is_dir() else file
        file = folder / "diffusion_pytorch_model.safetensors"
        if not file.exists():
            file = file.with_suffix(".bin")
    tensors = convert_keys(common.read_weights(file, flag, f"; {EXPECTED}"))
    with common.reading(flag, f"its tensors are those of another model; {EXPECTED}"):
        dims = [len(tensors[name]) for name in sorted(tensors)
                if name.startswith("encoder.down.") and name.endswith(".block.0.conv1.weight")]
        blocks = sum(name.startswith("encoder.down.0.") and name.endswith(".conv1.weight")
                     for name in tensors)
        with torch.device("meta"):                       # no memory yet, and no random numbers
            model = Autoencoder(dims, blocks, len(tensors["post_quant_conv.weight"]))
        model.to_empty(device="cpu").load_state_dict(tensors)
    return model.to(device).eval().requires_grad_(False)


def load_for(cfg, device):
    """The autoencoder that a config names, or None for a diffusion model of pixels."""
    if not cfg.autoencoder:
        if cfg.channels != 3:
            raise UserError(f"an image of {cfg.channels} channels is a latent (pixels have 3): "
                            "name its autoencoder with --autoencoder")
        return None
    vae = load(cfg.autoencoder, device)
    if vae.channels != cfg.channels:
        raise UserError(f"--channels {cfg.channels}: the latents of --autoencoder "
                        f"{cfg.autoencoder} have {vae.channels}")
    return vae


# ----------------------------------------------------------------------- latents, computed once
class Latents(image_data.CaptionedImages):
    """Captioned images as latents: image(i) -> (2, C, s, s) float16, mean and log-variance.

    root, split, items: as for CaptionedImages; size: of the images in pixels; vae: an Autoencoder
    on `device`. The first time, all images of the split are encoded into latents.npy in
    <folder>/<name of root>-<split>-<size>/; latents.json next to it says what they were made from.
    """
    def __init__(self, root, split, size, vae, folder="data/latents", device="cpu", items=None):
        if size % vae.factor:
            raise UserError(f"images of {size} x {size} pixels do not fit the autoencoder: "
                            f"choose a multiple of {vae.factor}")
        super().__init__(root, split, size)
        self.in_memory = True                            # for `batches`: no worker processes needed
        folder = Path(folder) / f"{Path(root).resolve().name}-{split}-{size}"
        path = folder / "latents.npy"
        note = folder / "latents.json"
        # names and sizes of the files: moved data are still the same data
        files = "\n".join(f"{os.path.relpath(image, root)} {size_of(image)}"
                          for image, _, _ in self.items)
        made_from = {
            "split": split, "size": size, "files": hashlib.sha256(files.encode()).hexdigest(),
            "encoder": common.fingerprint(nn.ModuleList([vae.encoder, vae.quant_conv])),
        }
        if not note.exists():
            pixels = image_data.CaptionedImages(root, split, size)
            broken = encode_images(pixels, vae, device, path)
            common.write_json(note, made_from | {"broken": broken})
        found = common.read_json(note)
        shape = (len(self.items), 2, vae.channels, size // vae.factor, size // vae.factor)
        if other := [name for name in made_from if found.get(name) != made_from[name]]:
            raise UserError(f"{folder}/ holds latents of something else ({other[0]} differs): "
                            "delete it")
        with common.reading(path, f"it is missing or damaged: delete {folder}/"):
            self.rows = np.load(path, mmap_mode="r")     # (N, 2, C, s, s), of the whole split
            if self.rows.shape != shape or self.rows.dtype != np.float16:
                raise ValueError(f"it holds {self.rows.shape}, not {shape}")
            self.broken = set(found["broken"])
        self.row_of = {image: row for row, (image, _, _) in enumerate(self.items)}
        if items is not None:
            self.items = items

    def image(self, i):
        """(2, C, s, s) float16; raises BrokenImage for an image that could not be read"""
        path = self.items[i][0]
        row = self.row_of[path]
        if row in self.broken:
            raise image_data.BrokenImage(f"{path} could not be read")
        return torch.from_numpy(self.rows[row].copy())   # a copy, since the map is read-only


def size_of(path):
    """In bytes; 0 for a dangling link, which will be a broken image."""
    return path.stat().st_size if path.exists() else 0


@torch.no_grad()
def encode_images(pixels, vae, device, path, batch_size=16):
    """Encodes a CaptionedImages into a .npy file, (N, 2, C, s, s) float16, whole or not at all.

    Returns the rows of broken images; they hold other images.
    """
    side = pixels.size // vae.factor
    shape = (len(pixels), 2, vae.channels, side, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = 2 * math.prod(shape)
    # on a full disk, writing to a memory map kills the process
    if shutil.disk_usage(path.parent).free < needed:
        raise UserError(f"{path} will take {needed / 1e9:.1f} GB, more than the disk has left")
    broken = []
    with common.atomic_write(path) as temporary:
        rows = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        batches = image_data.load_all(pixels, batch_size, f"encoding into {path.parent}/")
        for n, (images, _, reasons) in enumerate(batches):
            first = n * batch_size
            moments = torch.stack(vae.encode(image_data.to_float(images.to(device))), dim=1)
            rows[first:first + len(images)] = moments.half().cpu().numpy()
            broken += [first + i for i, reason in enumerate(reasons) if reason]
            if len(broken) > 0.01 * len(pixels):
                raise UserError(f"more than 1 % of the images cannot be read (such as "
                                f"{pixels.items[broken[0]][0]}): fix or remove them")
        rows.flush()
    return broken
