"""Stable Diffusion's autoencoder (Rombach et al. 2022, arXiv 2112.10752), by hand, and a cache of the latents it makes.

The idea. Most numbers of a picture are detail that no caption speaks of. So learn once to fold a picture into a latent that is 8 times
smaller on each side, and to unfold it again; a diffusion model then has 48 times fewer numbers to draw. What the encoder gives is a
normal distribution, from which every look at the picture is a draw:

    mean, logvar = encode(x)                     x (B, 3, S, S) in [-1, 1] -> each (B, 4, S/8, S/8)
    z = mean + exp(logvar / 2) noise             draw_latents
    x = decode(z)                                z (B, 4, S/8, S/8) -> (B, 3, S, S)

Two nets of convolutions, mirrored; channels and sides at 256 pixels:
    encoder   3 -> 128 x 256^2 -> 128 x 128^2 -> 256 x 64^2 -> 512 x 32^2 -> middle, with attention -> 2 x 4 x 32^2
    decoder   4 x 32^2 -> middle -> 512 x 32^2 -> 512 x 64^2 -> 512 x 128^2 -> 256 x 256^2 -> 128 x 256^2 -> 3

One core of a CPU takes 3.3 s to encode such a picture and 6.3 s to decode it, so the latents of a data set are computed once and kept:
16 kB a picture, 1.4 GB for COCO 2014. The autoencoder is used as published and never trained here. A diffusion model multiplies z by a
scale of its own (U-ViT on COCO: 0.23010), which belongs to its settings: nothing in this file knows of it.
"""
import functools
import hashlib
import os
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import common
from common import UserError


# ------------------------------------------------------------------------------------------------------------ the networks
def chain(**parts):
    """Modules one after the other, each under its name."""
    return nn.Sequential(OrderedDict(parts))


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


class ResidualBlock(nn.Module):
    """(B, before, H, W) -> (B, after, H, W)"""
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = group_norm(before), conv(before, after)
        self.norm2, self.conv2 = group_norm(after), conv(after, after)
        self.nin_shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Every place of the picture looks at every other, with a single head; the linear layers are 1 x 1 convolutions."""
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                           # softmax(q k^T / sqrt(C)) v, (B, 1, N, C)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2)"""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                              # zeros at the right and below only: so it was trained


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)"""
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(before, after, blocks, **resample):
    """The residual blocks of one resolution, then the step to the next."""
    return chain(block=nn.Sequential(*(ResidualBlock(after if j else before, after) for j in range(blocks))), **resample)


def middle(channels):
    return chain(block_1=ResidualBlock(channels, channels), attn_1=Attention(channels), block_2=ResidualBlock(channels, channels))


class Autoencoder(nn.Module):
    """Stable Diffusion's autoencoder (Rombach et al. 2022); the names of its parameters are those of CompVis's files.

    width: channels at full resolution; multipliers: channels of each resolution, in widths; blocks: residual blocks a resolution in the
    encoder, one more in the decoder; channels: of the latent. All widths must be multiples of 32, the groups of the norms.
    `factor`: pixels a latent is wide.
    """
    def __init__(self, width=128, multipliers=(1, 2, 4, 4), blocks=2, channels=4):
        super().__init__()
        widths = [width * multiplier for multiplier in multipliers]
        last, deep = len(widths) - 1, widths[-1]
        self.factor, self.channels = 2**last, channels
        down = (level(before, after, blocks, downsample=Downsample(after) if i < last else nn.Identity())
                for i, (before, after) in enumerate(zip([width, *widths], widths)))
        self.encoder = chain(conv_in=conv(3, width), down=nn.Sequential(*down), mid=middle(deep),
                             norm_out=group_norm(deep), silu=nn.SiLU(), conv_out=conv(deep, 2 * channels))
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        # up.0 is full resolution, as down.0 is: it comes last
        up = {str(i): level(widths[min(i + 1, last)], widths[i], blocks + 1, upsample=Upsample(widths[i]) if i else nn.Identity())
              for i in reversed(range(last + 1))}
        self.decoder = chain(conv_in=conv(channels, deep), mid=middle(deep), up=chain(**up),
                             norm_out=group_norm(widths[0]), silu=nn.SiLU(), conv_out=conv(widths[0], 3))

    def encode(self, x):
        """x (B, 3, S, S) in [-1, 1], S a multiple of `factor` -> mean and log-variance of the latent, each (B, channels, S/f, S/f)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, channels, S/f, S/f), as encoded (no scale) -> pictures (B, 3, S, S), in [-1, 1] but for a little overshoot."""
        return self.decoder(self.post_quant_conv(z))


# ------------------------------------------------------------------------------------------------------------------ loading
EXPECTED = ("expected Stable Diffusion's autoencoder: autoencoder_kl.pth of U-ViT, a whole Stable Diffusion file, "
            "or a diffusers folder with diffusion_pytorch_model.safetensors")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
RENAMED = {                                                                   # diffusers -> CompVis, in this order
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.", "mid_block.attentions.0.": "mid.attn_1.",
    "down_blocks.": "down.", "resnets.": "block.", "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.",
    "conv_shortcut.": "nin_shortcut.", "conv_norm_out.": "norm_out.", "group_norm.": "norm.",
    ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out.",
    ".query.": ".q.", ".key.": ".k.", ".value.": ".v.", ".proj_attn.": ".proj_out."}             # diffusers until 2023


def convert_keys(tensors):
    """Renames the tensors of any layout in circulation {name: tensor} to CompVis's names, and leaves out what is no autoencoder's.

    Known are CompVis's own layout, the same in a whole Stable Diffusion file (`first_stage_model.`), and that of diffusers, which
    counts the decoder's resolutions from the other end and has attention weights (C, C): here they are (C, C, 1, 1).
    """
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PARTS)}
    last = max((int(found[1]) for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name))), default=0)
    converted = {}
    for name, tensor in tensors.items():
        name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{last - int(found[1])}.", name)
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        converted[name] = tensor
    return converted


def build(tensors):
    """An autoencoder of the widths that the shapes of the tensors tell, without memory for its weights (on the device "meta")."""
    def count(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
    width = tensors["encoder.conv_in.weight"].shape[0]
    multipliers = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width for i in range(count("encoder.down."))]
    with torch.device("meta"):
        return Autoencoder(width, multipliers, count("encoder.down.0.block."), tensors["post_quant_conv.weight"].shape[0])


def load(path, device="cpu"):
    """Reads an autoencoder: a .pth, .ckpt, .pt, .bin or .safetensors file, or a folder of diffusers (its own, or one with vae/ in it).

    It comes in float32 and eval mode, frozen; its widths follow from the shapes of the tensors. Raises UserError for a path where there
    is none, a file that is cut off or holds code, and tensors of something else.
    """
    named, path = f"--autoencoder {path}", Path(path)
    if path.is_dir():
        files = [path / vae / f"diffusion_pytorch_model.{kind}" for vae in ("", "vae") for kind in ("safetensors", "bin")]
        path = next((file for file in files if file.is_file()), files[0])
    tensors = convert_keys(common.read_weights(path, named, f"; {EXPECTED}"))
    try:
        model = build(tensors)
    except (LookupError, ValueError, ZeroDivisionError, RuntimeError):
        raise UserError(f"{named} holds the tensors of something else; {EXPECTED}") from None
    there, here = ({name: tuple(tensor.shape) for name, tensor in group.items()} for group in (tensors, model.state_dict()))
    if wrong := sorted(name for name in there | here if there.get(name) != here.get(name)):
        raise UserError(f"{named} holds the tensors of something else ({len(wrong)} do not fit; {wrong[0]} is {there.get(wrong[0], 'missing')}, "
                        f"expected {here.get(wrong[0], 'no such')}); {EXPECTED}")
    model = model.to_empty(device=device)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def load_for(settings, device):
    """The autoencoder that settings name, or None for a network that sees pixels. Raises UserError if it does not fit."""
    model = load(settings.autoencoder, device) if settings.autoencoder else None
    if model is None and settings.channels != 3:
        raise UserError(f"--channels {settings.channels}: latents need --autoencoder, a file or folder of the Stable Diffusion autoencoder; "
                        "--channels 3 sees pixels")
    if model and model.channels != settings.channels:
        raise UserError(f"--autoencoder {settings.autoencoder} has latents of {model.channels} channels: give --channels {model.channels}")
    return model


# ------------------------------------------------------------------------------------------------------- latents, computed once
def draw_latents(moments, noise):
    """moments (B, 2, C, s, s), mean and log-variance; noise (B, C, s, s) -> z = mean + exp(logvar / 2) noise, (B, C, s, s) float32."""
    mean, logvar = moments.float().unbind(1)
    return mean + (logvar / 2).exp() * noise


def read_pictures(paths, size):
    """-> pictures uint8 (B, 3, S, S), black where one cannot be read, and the paths of those."""
    pictures, unread = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8), []
    for picture, path in zip(pictures, paths):
        try:
            picture.copy_(torch.from_numpy(common.load_picture(path, size)).permute(2, 0, 1))
        except common.BROKEN:
            unread.append(str(path))
    return pictures, unread


class Latents(common.CaptionedImages):
    """Captioned pictures whose latents were computed once: `picture(i)` gives (2, channels, S/f, S/f) float16, mean and log-variance.

    root, split: as for CaptionedImages. size: side of the pictures in pixels, a multiple of the autoencoder's factor f. autoencoder: what
    `load(path)` gave, on `device`; it encodes in float32, `batch` pictures at a time.
    The first opening fills <folder>/<name of root>-<split>-<size>/: latents.npy, (N, 2, channels, S/f, S/f) float16, and latents.json, which
    says what they were made from and how far it got; one that was interrupted goes on there. Data that was moved is still the same data.
    Raises UserError if the folder holds latents of something else or a damaged file, if the disk is too small, or if more than 1 % of
    the pictures cannot be read.
    """
    def __init__(self, root, split, size, autoencoder, path, folder="data/latents", device="cpu", batch=16):
        if size % autoencoder.factor:
            raise UserError(f"pictures of {size} x {size} pixels do not fit the autoencoder: choose a multiple of {autoencoder.factor}")
        super().__init__(root, split, size)
        self.cache = {}                                                       # stays empty, and tells `common.batches` to start no workers
        self.path = Path(folder) / f"{Path(root).resolve().name}-{split}-{size}" / "latents.npy"
        files, encoder = hashlib.sha256(), hashlib.sha256()
        for picture, _, _ in self.items:
            files.update(f"{picture.relative_to(root).as_posix()} {picture.stat().st_size}\n".encode())
        for name, tensor in autoencoder.state_dict().items():
            if name.startswith(("encoder.", "quant_conv.")):                  # another decoder changes no latent
                encoder.update(name.encode() + tensor.cpu().numpy().tobytes())
        made_from = {"split": split, "size": size, "pictures": len(self), "files": files.hexdigest(), "encoder": encoder.hexdigest()}
        side, stream = size // autoencoder.factor, functools.partial(self.encode, autoencoder, torch.device(device), batch)
        self.rows, note = common.collect(self.path, made_from, (len(self), 2, autoencoder.channels, side, side), np.float16, stream,
                                         f"encoding into {self.path.parent}/", flag="--latents", data=str(root), autoencoder=str(path), broken=[])
        self.row = {path: i for i, (path, _, _) in enumerate(self.items)}     # holds for any choice among the items
        self.broken = set(note["broken"])

    @torch.no_grad()
    def encode(self, autoencoder, device, batch, note):
        """Latents, batch by batch, from picture note["done"] on; note["broken"] gets the numbers of those that cannot be read."""
        paths = [str(picture) for picture, _, _ in self.items]
        broken = common.BrokenPictures(len(self))
        broken.paths.update(paths[i] for i in note["broken"])
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU reading takes no time beside encoding
        for pictures, unread in torch.utils.data.DataLoader(paths[note["done"]:], batch, num_workers=workers,
                                                            collate_fn=functools.partial(read_pictures, size=self.size)):
            moments = torch.stack(autoencoder.encode(common.to_float(pictures.to(device))), dim=1)
            note["broken"] += [i for i in range(note["done"], note["done"] + len(pictures)) if paths[i] in unread]
            yield moments.half().cpu().numpy()
            broken.add(unread)                                                # may stop it all, when the batch is kept

    def __getstate__(self):
        return vars(self) | {"rows": None}                                    # a memory map would be pickled as a copy of the whole file

    def __setstate__(self, state):
        vars(self).update(state)
        self.rows = np.load(self.path, mmap_mode="r")

    def picture(self, i):
        """(2, channels, S/f, S/f) float16; raises OSError for a picture that could not be read when it was to be encoded."""
        row = self.row[self.items[i][0]]
        if row in self.broken:
            raise OSError(f"{self.items[i][0]} could not be read")
        return torch.from_numpy(self.rows[row].copy())
