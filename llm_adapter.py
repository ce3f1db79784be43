r"""An LLM as the text encoder, with a small adapter trained in three stages (arXiv 2405.12914).

The idea. CLIP's text encoder reads English only, and only a few tokens. A language model reads all
languages, at any length, but its states mean nothing to a U-ViT that was trained on CLIP's
features. So a small transformer, the adapter, turns them into features like CLIP's. It is trained
in three stages:

    stage 1   text to text: adapter(LLM(text)) learns to match CLIP(the same in English); no images
    stage 2   on images: adapter and U-ViT together, with the diffusion loss
    stage 3   on the best images: the U-ViT alone

Other languages and long texts occur in stage 1 only; the captions of stages 2 and 3 are English.

    c = CLIP(the same in English)                        (B, L, text_dim), frozen
    h = LLM(text)                                        (B, n, llm_dim), frozen
    m = encoder blocks(MLP(h) + conv(MLP(h)) + pos)      (B, n, width)
    r = decoder blocks(queries, context m)               (B, L, width), L learned queries
    y = mean + std Linear(r)                             (B, L, text_dim), in place of c
    p = Linear(r)                                        (B, L), p > 0 for a token, else padding

    cos-len = 1 - mean cos(y, c) + 2e-5 mean (|y| - |c|)^2         over the tokens of c
    L_1 = cos-len + cross-entropy(p, mask of c)
    L_2 = L_3 = |U-ViT(x_t, t, y) - target|^2                      uvit_fusion.diffusion_loss

    python llm_adapter.py --train    # on runs/uvit_fusion: 14 to 30 min; 81 to 86 % right
                                     # in four languages and in paragraphs
    python sample.py "tres círculos verdes" --run runs/llm_adapter

Differs from the paper (its values in brackets; docs/llm_adapter.md lists all ten):
 1. toy: width 128, 2 + 2 blocks, the embeddings of a tiny LLM with 1 M parameters
    [2048, 4 + 4, the last layer of Baichuan2-7B-Chat]; a U-ViT [SDXL].
 2. A decoder block attends to queries and LLM tokens at once [self-, then cross-attention]. The
    LLM tokens get a convolution over their neighbours and sinusoidal positions [neither].
 3. Padding is masked everywhere, and p tells which tokens of y are padding [in stage 1 padding is
    attended to; in stages 2 and 3 there is none].
 4. Captions are dropped in stages 2 and 3, and each batch of stage 1 has the empty prompt [never]:
    guidance needs it.
 5. The LLM's states are normalised, and y has CLIP's mean and standard deviation [neither].
 6. Stage 3 freezes the adapter, as in the paper's figure [its code trains it].
"""
import argparse
import copy
import dataclasses
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import autoencoder
import common
import encoders
import image_data
import toy.multilingual
import toy.validation
import uvit_fusion
from common import UserError
from uvit_fusion import Block, Pipeline, UViT, padding_bias, timestep_embedding


@dataclass
class Config:
    # the models
    base: str = "runs/uvit_fusion"  # run of uvit_fusion.py whose text encoder is replaced
    llm: str = "runs/toy/llm"  # language model: a folder, or a name on the Hugging Face hub
    llm_layer: int = 0  # layer whose states are read: 0 the embeddings, -1 the last
    instruction: str = ""  # text put before each prompt; its own states are dropped
    # the adapter
    width: int = 128  # width of the adapter
    heads: int = 4  # its attention heads
    conv_kernel: int = 5  # width of the convolution over the LLM tokens, before the blocks
    encoder_blocks: int = 2  # blocks over the LLM tokens
    decoder_blocks: int = 2  # blocks over the learned queries
    # the stages
    steps_1: int = 1700  # training steps of stage 1
    steps_2: int = 300  # training steps of stage 2
    steps_3: int = 100  # training steps of stage 3
    lr_1: float = 2e-3  # highest learning rate of AdamW in stage 1
    lr_2: float = 1e-4  # highest learning rate of AdamW in stage 2
    lr_3: float = 5e-5  # highest learning rate of AdamW in stage 3
    muon_lr_1: float = 2e-2  # highest learning rate of Muon in stage 1
    muon_lr_2: float = 5e-4  # highest learning rate of Muon in stage 2
    muon_lr_3: float = 5e-4  # highest learning rate of Muon in stage 3
    # no flags: set by `train_stage` for the current stage
    steps: int = 0
    lr: float = 0.0
    muon_lr: float = 0.0
    # the training
    batch_size: int = 64  # texts (stage 1) or images per step
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the matrices of the blocks only
    warmup: int = 50  # steps of linear warm-up
    decay: float = 1.0  # share of the steps, at the end, in which the rate falls to 0 (cosine)
    weight_decay: float = 0.03  # of both optimizers
    betas: tuple = (0.9, 0.99)  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    ema: float = 0.99  # decay of the running average of the weights, lower at first
    length_weight: float = 2e-5  # stage 1: weight of the squared difference of lengths
    english_share: float = 0.4  # stage 1: share of captions among the texts; the rest are pairs
    caption_dropout: float = 0.1  # stages 2 and 3: share of captions replaced by the empty one
    seed: int = 0  # of weights, order and noise
    # the data
    data: str = "shapes"  # shapes (the toy world), or a folder: MS-COCO, or .txt beside images
    parallel: str = ""  # stage 1: pairs, {"text": ..., "english": ...} per line; "": toy's or none
    quality: str = "quality"  # stage 3: field of the annotations with the score, or a JSON file
    quality_split: str = "quality"  # stage 3: split that the images are taken from
    best: float = 0.06  # stage 3: share of the images, those with the highest scores
    # no flags: `prepare` sets the hashes of the weights; sample.py loads a run by its method
    base_identity: str = ""
    llm_identity: str = ""
    method: str = "llm_adapter"

    def __post_init__(self):
        by_stage = ("steps", "lr", "muon_lr")
        unset = {name: (0, 2**31) for name in by_stage}            # 0 until a stage runs
        stages = {f"{name}_{n}": common.BOUNDS[name] for name in by_stage for n in (1, 2, 3)}
        common.check_bounds(
            self, **unset, **stages, batch_size=(2, 2**20), width=(2, 10**6), conv_kernel=(1, 1000),
            encoder_blocks=(0, 1000), decoder_blocks=(1, 1000), english_share=(0, 1), best=(0, 1))
        if self.width % self.heads or self.width % 2:
            raise UserError(f"--width {self.width} must be even and a multiple of --heads "
                            f"{self.heads}")


PRESETS = {
    "toy": {},
    # widths, blocks, rates, warm-up are the release's; its batch size is 512
    "coco": dict(
        # the paper's LLM is baichuan-inc/Baichuan2-7B-Chat, which needs --trust-remote-code
        base="runs/coco256", llm="Qwen/Qwen2.5-7B-Instruct", llm_layer=-1,
        width=2048, heads=16, encoder_blocks=4, decoder_blocks=4,
        steps_1=100_000, steps_2=100_000, steps_3=10_000, lr_1=2e-5, lr_2=2e-5, lr_3=1e-5,
        batch_size=256, optimizer="adamw", warmup=1000, ema=0.9999,
        data="coco", quality="scores.json", quality_split="train"),
}
# --quick: a smaller run
QUICK = dict(out="runs/quick_llm_adapter", samples=64, steps_1=240, steps_2=10, steps_3=10,
             warmup=10)


# ------------------------------------------------------------------------------------- the adapter
class Adapter(nn.Module):
    """The LLM's states, llm_dim wide, -> `length` features like CLIP's, text_dim wide."""
    def __init__(self, cfg, llm_dim, length, text_dim):
        super().__init__()
        width = cfg.width
        self.norm_in = nn.LayerNorm(llm_dim)              # the scale differs from LLM to LLM
        self.mlp = nn.Sequential(nn.Linear(llm_dim, width), nn.GELU(), nn.Linear(width, width))
        self.conv = nn.Conv1d(width, width, cfg.conv_kernel, padding="same")
        self.encoder_blocks = nn.ModuleList(
            Block(width, cfg.heads) for _ in range(cfg.encoder_blocks))
        self.decoder_blocks = nn.ModuleList(
            Block(width, cfg.heads) for _ in range(cfg.decoder_blocks))
        self.queries = nn.Parameter(torch.randn(1, length, width))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, text_dim)
        self.presence = nn.Linear(width, 1)               # p
        # of c, the features of the replaced text encoder; set by `new_model`
        self.register_buffer("mean", torch.zeros(text_dim))
        self.register_buffer("std", torch.ones(text_dim))
        uvit_fusion.init_fan_in(self)
        nn.init.zeros_(self.conv.weight)                  # x + conv(x) starts as x, as in a block
        nn.init.zeros_(self.conv.bias)

    def encode(self, h, mask):
        """h (B, n, llm_dim), mask (B, n) -> m (B, n, width)."""
        m = self.mlp(self.norm_in(h))
        # in a long text the positions alone do not tell which words belong together
        tokens = (m * mask[..., None]).transpose(1, 2)           # (B, width, n), padding is zero
        m = m + self.conv(tokens).transpose(1, 2)
        positions = torch.arange(m.shape[1], device=m.device)
        m = m + timestep_embedding(positions, m.shape[2]).to(m.dtype)    # sinusoids of positions
        bias = padding_bias(mask)
        for block in self.encoder_blocks:
            m = block(m, bias=bias)
        return m

    def decode(self, m, mask):
        """m (B, n, width), mask (B, n) -> r (B, L, width)."""
        r = self.queries.expand(len(m), -1, -1).to(m.dtype)
        bias = padding_bias(mask, before=r.shape[1])             # keys: [queries, LLM tokens]
        for block in self.decoder_blocks:
            r = block(r, context=m, bias=bias)
        return self.norm(r)

    def forward(self, h, mask):
        """h (B, n, llm_dim), mask (B, n) -> y (B, L, text_dim), p (B, L)."""
        r = self.decode(self.encode(h, mask), mask)
        y = self.mean + self.std * self.out(r).float()
        p = self.presence(r)[..., 0].float()
        return y, p


class AdaptedEncoder:
    """LLM and adapter in place of a text encoder: texts -> y (B, L, text_dim), mask (B, L)."""
    def __init__(self, llm, adapter, precision):
        self.llm = llm
        self.adapter = adapter
        self.precision = precision

    def __call__(self, texts):
        h, h_mask = self.llm(texts)
        with common.autocast(h.device, self.precision):
            y, p = self.adapter(h, h_mask)
        mask = (p > 0).cummin(1).values                   # all after the first padding is padding
        mask[:, 0] = True                                 # CLIP's start token is always there
        return y, mask


# -------------------------------------------------------------------------------------- the losses
def cos_len(pred, target, length_weight):
    """1 - mean cos(pred, target) + length_weight mean (|pred| - |target|)^2, of (N, D) tokens."""
    cosine = F.cosine_similarity(pred, target, dim=-1).mean()
    lengths = F.mse_loss(pred.norm(dim=-1), target.norm(dim=-1))
    return 1 - cosine + length_weight * lengths


def alignment_loss(cfg, adapter, h, h_mask, c, c_mask, mask_text):
    """L_1 of a batch of texts; the cosine is a mean over all their tokens.

    h (B, n, llm_dim), h_mask (B, n): of the LLM; c (B, L, text_dim), c_mask (B, L): of the text
    encoder, for the same in English. mask_text: False for a U-ViT that attends to padding.
    """
    y, p = adapter(h, h_mask)
    visible = c_mask if mask_text else torch.ones_like(c_mask)              # to the U-ViT
    loss = cos_len(y[visible], c[visible], cfg.length_weight)
    return loss + F.binary_cross_entropy_with_logits(p, visible.float())


def stage1_loss(cfg, adapter, base, llm, pairs):
    """L_1 of pairs (text, the same in English)."""
    # The longest quarter is separate, since all texts of a batch are padded to its longest: a step
    # took 0.59 s with the batch in one piece and 0.27 s in two, on one core of an AMD EPYC.
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    cut = 3 * len(pairs) // 4
    loss = 0
    for part in (pairs[:cut], pairs[cut:]):
        h, h_mask = llm([text for text, _ in part])
        c, c_mask = base.text_encoder([english for _, english in part])
        with common.autocast(base.device, base.precision):
            part_loss = alignment_loss(cfg, adapter, h, h_mask, c, c_mask, base.cfg.mask_text)
        loss = loss + len(part) / len(pairs) * part_loss
    return loss


def stage2_3_loss(cfg, uvit, base, text_encoder, images, captions):
    """L_2 and L_3: the base's own loss, with an `AdaptedEncoder` in place of its text encoder."""
    x_0 = base.encode(images)                                                  # (B, C, S, S)
    text, mask = text_encoder(uvit_fusion.drop_captions(captions, cfg.caption_dropout))
    t = base.diffusion.sample_timesteps(len(x_0), base.cfg.time_power, base.device)
    eps = torch.randn_like(x_0)
    with common.autocast(base.device, base.precision):
        return uvit_fusion.diffusion_loss(uvit, base.diffusion, x_0, t, eps, text, mask)


# ---------------------------------------------------------------------------------------- the data
def sample_pairs(cfg, captions, parallel, step):
    """The texts of a stage 1 step, [(text, the same in English)], the empty prompt first."""
    rng = random.Random(cfg.seed * 10**9 + step)    # a step depends on its number alone
    pairs = [("", "")]
    while len(pairs) < cfg.batch_size:
        if not parallel or rng.random() < cfg.english_share:
            caption = rng.choice(captions)
            pairs.append((caption, caption))
        else:
            pairs.append(rng.choice(parallel))
    return pairs


def best_items(cfg, data, size):
    """The share `cfg.best` of a split's items with the highest scores, for stage 3."""
    try:
        items = image_data.CaptionedImages(data, cfg.quality_split, size).items
        if Path(cfg.quality).suffix == ".json":
            scores = common.read_json(cfg.quality)        # {file name: score}
        else:
            scores = {annotation["file_name"]: annotation.get(cfg.quality)
                      for _, _, annotation in items}
        names = [annotation["file_name"] for _, _, annotation in items]
        missing = [name for name in names if not isinstance(scores.get(name), (int, float))
                   or not math.isfinite(scores[name])]
        if missing:
            raise UserError(f"{len(missing)} of {len(items)} images have no score ({missing[0]})")
    except UserError as error:
        raise UserError(
            f"--quality {cfg.quality} --quality-split {cfg.quality_split}: {error}: stage 3 takes "
            "images from that split, and their scores from a field of its annotations or from a "
            "JSON file; --stages 2 skips it") from None
    ranked = sorted(items, key=lambda item: -scores[item[2]["file_name"]])
    return ranked[:max(1, round(cfg.best * len(items)))]


# ---------------------------------------------------------------------------------------- training
def train_stage(n, cfg, model, base, llm, data, folder, args):
    """Trains the adapter (n = 1), adapter and U-ViT (2), or the U-ViT alone (3).

    model: from `new_model`, gets the EMA weights; base: the pipeline whose text encoder is
    replaced; data: (English captions, [(text, the same in English)]) in stage 1, else a dataset.
    """
    cfg = dataclasses.replace(
        cfg, steps=getattr(cfg, f"steps_{n}"), lr=getattr(cfg, f"lr_{n}"),
        muon_lr=getattr(cfg, f"muon_lr_{n}"))
    seed = 10 * cfg.seed + n                        # each stage draws different noise
    model.requires_grad_(False)
    trained = {1: model["adapter"], 2: model, 3: model["uvit"]}[n].requires_grad_(True)
    optimizers = uvit_fusion.make_optimizers(trained, cfg, base.precision)
    ema = copy.deepcopy(model)
    parameters = list(model.parameters())           # lists: see `uvit_fusion.train`
    ema_parameters = list(ema.parameters())
    run = common.Run(folder, cfg, [model, ema, *optimizers], ema.state_dict(), args,
                     base.precision, title=f"stage {n}", dataset=None if n == 1 else data)
    common.write_json(folder / "uvit.json", dataclasses.asdict(base.cfg))
    text_encoder = AdaptedEncoder(llm, model["adapter"], base.precision)
    if n == 1:
        steps = range(run.start + 1, cfg.steps + 1)
        batches = (sample_pairs(cfg, *data, step) for step in steps)
    else:
        batches = image_data.batches(data, cfg.batch_size, run.start, cfg.steps, seed)

    for step, batch in enumerate(batches, run.start + 1):
        torch.manual_seed(seed * 10**8 + step)      # a resumed run equals an uninterrupted one
        uvit_fusion.set_learning_rate(optimizers, cfg, step)
        if n == 1:
            loss = stage1_loss(cfg, model["adapter"], base, llm, batch)
        else:
            loss = stage2_3_loss(cfg, model["uvit"], base, text_encoder, *batch)
        trained.zero_grad()
        loss.backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(trained.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        uvit_fusion.update_ema(ema_parameters, parameters, min(cfg.ema, step / (step + 10)))
        run.log(step, loss=loss)
        if run.due(step):
            run.save(step)
    model.load_state_dict(ema.state_dict())


def train(cfg, base, llm, data, folder, args, stages=(1, 2, 3), adapter_class=Adapter):
    """Runs stages, each in <folder>/stage<n>; returns the pipeline of the last one.

    args: has .overwrite, and .resume, which leaves finished stages as they are.
    """
    items = image_data.CaptionedImages(data, "train", base.image_size).items
    captions = [caption for _, texts, _ in items for caption in texts]
    parallel = []
    if cfg.parallel:
        name = f"--parallel {cfg.parallel}"
        lines = common.read_json_lines(cfg.parallel, name, ("text", "english"))
        parallel = [(line["text"], line["english"]) for line in lines]
    if 3 in stages:                                 # missing scores fail here, not after stage 2
        best = best_items(cfg, data, base.image_size)
    if args.overwrite:                              # an old stage must not follow a new one
        for n in (1, 2, 3):
            shutil.rmtree(folder / f"stage{n}", ignore_errors=True)
        common.remove_run(folder)
    later = folder / f"stage{max(stages) + 1}"
    if args.resume and later.exists():              # <folder> is a copy of the last stage
        raise UserError(f"--stages {max(stages)}: {later}/ already exists: leave --stages out")
    model = new_model(cfg, base, llm, captions, adapter_class)

    for n in stages:
        stage_folder = folder / f"stage{n}"
        if n == 1:
            stage_data = (captions, parallel)
        elif n == 2:
            stage_data = base.dataset(data, "train")
        else:
            stage_data = base.dataset(data, cfg.quality_split, best)
        train_stage(n, cfg, model, base, llm, stage_data, stage_folder, args)
        for name in ("config.json", "uvit.json", "model.safetensors"):   # makes <folder> a run
            with common.atomic_write(folder / name) as unfinished:
                shutil.copy(stage_folder / name, unfinished)
    text_encoder = AdaptedEncoder(llm, model["adapter"], base.precision)
    return Pipeline(model["uvit"], text_encoder, base.cfg, base.device, base.precision, base.vae)


# --------------------------------------------------------------------------------- models and runs
def make_model(cfg, uvit_cfg, llm, adapter_class=Adapter):
    """ModuleDict of "adapter" and "uvit"; a stage trains a part of it and saves all."""
    adapter = adapter_class(cfg, llm.dim, uvit_cfg.text_length, uvit_cfg.text_dim)
    return nn.ModuleDict({"adapter": adapter, "uvit": UViT(uvit_cfg)}).to(llm.device).eval()


def new_model(cfg, base, llm, captions, adapter_class):
    """A new adapter and the U-ViT of `base`, with mean and std of the base's text features."""
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, base.cfg, llm, adapter_class)
    model["uvit"].load_state_dict(base.model.state_dict())
    c, mask = base.text_encoder(random.Random(cfg.seed).choices(captions, k=512))
    tokens = c[mask] if base.cfg.mask_text else c.flatten(0, 1)
    model["adapter"].mean.copy_(tokens.mean(0))
    model["adapter"].std.copy_(tokens.std(0))
    return model


def load_pipeline(path, device, precision, **changes):
    """The pipeline of a run folder or a .safetensors file in one; changes: to base settings."""
    if "clip" in changes:
        raise UserError("--clip has no effect here: the text encoder of this run is its LLM")
    folder, weights = common.run_files(path)
    cfg = common.read_config(Config, folder)
    uvit_cfg = common.read_config(uvit_fusion.Config, folder, "uvit.json")
    uvit_cfg = dataclasses.replace(uvit_cfg, **changes)
    llm = encoders.LLMEncoder(cfg.llm, cfg.llm_layer, cfg.instruction, device, precision)
    if llm.identity != cfg.llm_identity:
        raise UserError(f"{cfg.llm} is not the language model that {folder}/ was trained with: "
                        "restore that one")
    model = make_model(cfg, uvit_cfg, llm).requires_grad_(False)
    common.load_into(model, common.read_weights(weights, f"checkpoint {weights}"), weights)
    text_encoder = AdaptedEncoder(llm, model["adapter"], precision)
    vae = autoencoder.load_for(uvit_cfg, device)
    return Pipeline(model["uvit"], text_encoder, uvit_cfg, device, precision, vae)


# -------------------------------------------------------------------------------------------- main
def prepare(cfg, args):
    """The base, the folder of the data, the LLM, and cfg with the identities of base and LLM."""
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    base = uvit_fusion.load_pipeline(cfg.base, device, precision)
    data = toy.prepare(cfg.data, base.cfg.clip, base.image_size, cfg.llm)
    llm = encoders.LLMEncoder(cfg.llm, cfg.llm_layer, cfg.instruction, device, precision)
    cfg = dataclasses.replace(cfg, base_identity=base.identity(), llm_identity=llm.identity)
    if cfg.data == "shapes" and not cfg.parallel:
        cfg.parallel = f"{data}/annotations/parallel_train2017.jsonl"
    return base, data, llm, cfg


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true",
                        help="run the stages and, on the toy world, draw and grade prompts in four "
                             "languages and long ones")
    parser.add_argument("--stages", type=int, choices=(1, 2, 3), default=3,
                        help="how many stages to run, from the first (default all)")
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10,
                        help="sampling steps per graded image (default %(default)s)")
    parser.add_argument("--font", help="font file for the grids: the default lacks Chinese")
    common.add_training_flags(parser, "run folder (default runs/llm_adapter)", QUICK)
    common.add_config_flags(parser, Config, PRESETS)
    args = common.parse_args(parser, QUICK)
    if not args.train:
        parser.print_help()
        return
    cfg = common.make_config(Config, PRESETS, args)
    if cfg.data != "shapes":
        common.refuse_flags(parser, args, ["sample_steps", "font"],
                            "it is only for the toy world")
    folder = Path(args.out or "runs/llm_adapter")
    common.check_run(folder, args)
    args.font = common.load_font(args.font)         # a bad file fails here, not after training
    base, data, llm, cfg = prepare(cfg, args)
    begin = time.time()
    stages = range(1, args.stages + 1)
    pipeline = train(cfg, base, llm, data, folder, args, stages)
    if cfg.data == "shapes":
        after_stage = {n: load_pipeline(folder / f"stage{n}", base.device, base.precision)
                       for n in stages}
        figures = toy.multilingual.report(base, after_stage, data, folder, args)
        common.finish(folder, figures, begin)
    else:
        toy.validation.report(pipeline, data, folder, args.samples, begin)


if __name__ == "__main__":
    common.entry(main)
