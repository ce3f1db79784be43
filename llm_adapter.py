r"""An LLM as the text encoder of a text-to-image model, by a lightweight adapter in three stages (arXiv 2405.12914).

The idea. CLIP's text encoder reads English only, and few tokens. A language model has read everything, at any length, but its states
mean nothing to a U-ViT that was trained on CLIP's. So put a small transformer between the two, the adapter, and train it in three stages:

    1  text to text, no pictures: what LLM and adapter make of a caption shall be what CLIP makes of its English wording
    2  on pictures: adapter and U-ViT together, by the diffusion loss, English captions only
    3  on the best pictures: the U-ViT alone

Other languages and long prompts occur in stage 1 only. That the pictures follow them is carried over by the alignment.

    h = LLM(prompt)                                            (B, n, llm_dim), frozen; n tokens of the LLM
    m = encoder blocks(near(MLP(h)) + positions)               (B, n, width), near(m) = m + convolution over 5 neighbours
    r = decoder blocks(queries | m)                            (B, L, width), a learned query for each token that the U-ViT expects
    y = mean + std * Linear(r)                                 (B, L, text_dim), in the place of CLIP's; mean and std are CLIP's own
    p = Linear(r)                                              (B, L): is there a token (p > 0), or is it padding, which the U-ViT does not see?

    L_1 = 1 - mean cos(y, c) + 2e-5 mean (|y| - |c|)^2         "cos-len" to CLIP's c, over the tokens that the U-ViT sees; and cross-entropy for p
    L_2 = L_3 = | U-ViT(x_t, t, y) - target |^2                the loss of `uvit_fusion.Diffusion`; a dropped caption is "", through LLM and adapter

    python llm_adapter.py --train                             # all stages, on the flagship in runs/uvit_fusion: 10 min on two CPU cores
    python llm_adapter.py --train --stages 1                  # one stage alone; the next goes on with --stages 2 --resume
    python llm_adapter.py --compare                           # the ablations, in one table
    python sample.py "tres círculos verdes" --run runs/llm_adapter
    python llm_adapter.py --train --base runs/coco --data path/to/coco --llm Qwen/Qwen2.5-1.5B --llm-layer -1 --parallel pairs.jsonl --stages 1 2

Differs from the paper (its released value in brackets):
 1. toy: width 128, 2 encoder and 2 decoder blocks [2048, 4 and 4], a tiny LLM of 1 M parameters [Baichuan2-7B-Chat], a U-ViT [SDXL]; of the
    LLM its embeddings are read [the last layer]: the states of so small a one align later, see --compare, so the adapter does the understanding.
 2. A decoder block asks queries and LLM tokens in one attention [self-attention, then cross-attention]; LLM tokens get sinusoidal positions, and
    before them a convolution over their neighbours [none]: after a short stage 1 65 % of paragraphs came out right with it, 32 % without.
 3. Padding is masked everywhere [in stage 1 attended to, in 2 and 3 absent], and the adapter says which of its tokens are padding.
 4. Captions are dropped with p = 0.1 in stages 2 and 3 [never]. In stage 1 every batch holds the empty prompt once, so that guidance works after it.
 5. toy: Muon and AdamW, 0.02 and 2e-3 in stage 1, batch 64 [AdamW 2e-5, batch 512]; blocks begin as the identity, as in the U-ViT.
 6. The U-ViT has no pooled input, so the pooled term has weight 0; --pooled-weight turns it on; nothing reads it then.
 7. Stage 3 freezes the adapter, as in the paper's figure [its code trains it].
 8. The LLM's states are normalised, the output has CLIP's mean and std [neither]; the rate falls along a cosine [linearly]; an average of
    the weights is kept [not known]. The pooled features are the mean of all queries [of the inner ones], aligned to CLIP's last token.
 9. A long prompt is aligned to a short English wording of the same, in as many tokens as CLIP reads [227 queries: 3 x 75 + 2].
10. Stages 2 and 3 minimise the loss that the base was trained with [eps]. None of it reaches p, which is trained in stage 1 alone.
"""
import argparse
import copy
import dataclasses
import functools
import math
import random
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import uvit_fusion
from common import UserError, setting
from uvit_fusion import Block, UViT, time_features


@dataclass
class Settings:
    """Everything that makes a run: saved as config.json, read back by whatever loads the run."""
    # what it stands on
    base: str = setting("runs/uvit_fusion", "run of uvit_fusion.py whose text encoder is replaced")
    llm: str = setting("runs/toy/llm", "language model: a folder in the Hugging Face format or a name on its hub")
    llm_layer: int = setting(0, "whose states are read: 0 the embeddings, -1 the last layer")
    instruction: str = setting("", "text put before each prompt, whose own tokens are cut off again")
    # the adapter
    adapter: str = setting("transformer", '"transformer", or "mlp" for each token by itself (an ablation)', choices=("transformer", "mlp"))
    width: int = setting(128, "of the adapter", low=2)
    window: int = setting(5, "tokens side by side that are put together before the blocks", low=1)
    encoder_blocks: int = setting(2, "that look at the LLM's tokens", low=0)
    decoder_blocks: int = setting(2, "in which the queries ask them", low=1)
    heads: int = setting(4, "attention heads", low=1)
    mask: bool = setting(True, "hide the LLM's padding from the adapter (an ablation)")
    # the training: three values are those of stages 1, 2 and 3
    steps: tuple = setting((1700, 300, 100), "training steps", low=0)
    batch: tuple = setting((64, 64, 64), "texts, pictures, pictures a step", low=1)
    optimizer: str = setting("muon", '"adamw", or "muon" for the matrices of the blocks and AdamW for the rest', choices=("adamw", "muon"))
    lr: tuple = setting((2e-3, 1e-4, 5e-5), "highest learning rates of AdamW", above=0)
    muon_lr: tuple = setting((2e-2, 5e-4, 5e-4), "and of Muon", above=0)
    warmup: int = setting(50, "steps of linear warm-up", low=0)
    decay: float = setting(1.0, "share of the steps, at the end, over which the rate falls to zero along a cosine", low=0, high=1)
    weight_decay: float = setting(0.03, "of either optimiser", low=0)
    betas: tuple = setting((0.9, 0.99), "of AdamW", low=0, high=0.99999)
    clip_grad: float = setting(1.0, "largest norm of the gradient (0: no clipping)", low=0)
    ema: float = setting(0.99, "decay of the running average of the weights", low=0, high=1)
    drop: float = setting(0.1, "stages 2 and 3: share of captions replaced by the empty one", low=0, high=1)
    english: float = setting(0.4, "stage 1: share of captions of the data, whose target is the caption itself; the rest are pairs", low=0, high=1)
    length_weight: float = setting(2e-5, "stage 1: weight of the squared difference of lengths", low=0)
    pooled_weight: float = setting(0.0, "stage 1: weight of the pooled features", low=0)
    seed: int = setting(0, "of weights, order and noise", low=0, high=10**6)
    # what it is trained on
    data: str = setting("shapes", '"shapes" (the toy world), a folder in the layout of MS-COCO, or one of pictures with a .txt beside each')
    parallel: str = setting("", 'pairs for stage 1, a JSON object a line, {"text": ..., "english": ...} (default: what the toy world has)')
    quality: str = setting("quality", "stage 3: field of the annotations, or JSON file of {file name: score}, that says how good a picture is")
    quality_split: str = setting("quality", "stage 3: split that the pictures are taken from")
    best: float = setting(0.06, "stage 3: share of the pictures that is good enough", low=1e-3, high=1)
    base_identity: str = ""        # of the flagship and its text encoder, down to the weights; set from them
    llm_identity: str = ""         # of the language model, layer and instruction, likewise
    method: str = "llm_adapter"

    def __post_init__(self):
        """Raises UserError for settings that are out of range or do not fit together."""
        common.check_limits(self)
        if self.width % self.heads or self.width % 2:
            raise UserError(f"--width {self.width} cannot be shared by {self.heads} heads: choose an even multiple of --heads")

    def stage(self, n):
        """The settings of one stage by the names that `uvit_fusion.make_optimizers` and `learning_rate` know."""
        return types.SimpleNamespace(**vars(self) | {name: getattr(self, name)[n - 1] for name in ("steps", "batch", "lr", "muon_lr")})


PRESETS = {
    "toy": {},
    # the release, as far as a U-ViT allows
    "coco": dict(base="runs/coco256", llm="baichuan-inc/Baichuan2-7B-Chat", llm_layer=-1, width=2048, encoder_blocks=4, decoder_blocks=4, heads=16,
                 steps=(100_000, 100_000, 10_000), batch=(512, 256, 256), optimizer="adamw", lr=(2e-5, 2e-5, 1e-5), warmup=1000, ema=0.9999,
                 data="coco", quality="scores.json", quality_split="train"),
}


# ------------------------------------------------------------------------------------------------------------ the adapter
class Adapter(nn.Module):
    """LLM features (B, n, llm_dim), mask (B, n) -> text features (B, L, text_dim), presence logits (B, L), pooled features (B, text_dim).

    length: L; text_dim, mean, std (text_dim,): of the text encoder that it replaces.
    """
    def __init__(self, s, llm_dim, length, text_dim):
        super().__init__()
        self.use_mask, self.plain, self.length = s.mask, s.adapter == "mlp", length
        self.norm_in = nn.LayerNorm(llm_dim)                                  # states of LLMs are of all sizes
        self.mlp = nn.Sequential(nn.Linear(llm_dim, s.width), nn.GELU(), nn.Linear(s.width, s.width))
        self.near = nn.Conv1d(s.width, s.width, s.window, padding="same")
        self.encoder_blocks = nn.ModuleList(Block(s.width, s.heads) for _ in range(0 if self.plain else s.encoder_blocks))
        self.decoder_blocks = nn.ModuleList(Block(s.width, s.heads) for _ in range(0 if self.plain else s.decoder_blocks))
        self.queries = nn.Parameter(torch.randn(1, length, s.width))
        self.norm = nn.LayerNorm(s.width)
        self.out, self.present = nn.Linear(s.width, text_dim), nn.Linear(s.width, 1)
        self.pooled = nn.Sequential(nn.Linear(s.width, s.width), nn.GELU(), nn.Linear(s.width, text_dim))
        self.register_buffer("mean", torch.zeros(text_dim))
        self.register_buffer("std", torch.ones(text_dim))
        uvit_fusion.init_fan_in(self)
        nn.init.zeros_(self.near.weight)                                      # it begins as the identity, as the blocks do, but for its bias

    def forward(self, h, mask):
        # n in steps of 16: a CPU's library of bf16 products prepares itself for each new shape, and texts of all lengths took twice as long
        h, mask = F.pad(h, (0, 0, 0, -h.shape[1] % 16)), F.pad(mask, (0, -h.shape[1] % 16))
        m, n = self.mlp(self.norm_in(h)), h.shape[1]                          # (B, n, width)
        if not self.use_mask:
            mask = torch.ones_like(mask)
        if self.plain:
            r = F.pad(m, (0, 0, 0, max(0, self.length - n)))[:, :self.length]
            present = F.pad(mask, (0, max(0, self.length - n)))[:, :self.length].float() * 20 - 10      # sure logits
        else:
            # what stands side by side belongs together, wherever in a long text it stands
            m = m + self.near((m * mask[..., None]).transpose(1, 2)).transpose(1, 2)
            m = m + time_features(torch.arange(n, device=h.device), m.shape[-1]).to(m.dtype)    # in fp32 it would turn all tokens to fp32
            bias = torch.zeros(mask.shape, device=h.device).masked_fill(~mask, -math.inf)[:, None, None]       # (B, 1, 1, n)
            for block in self.encoder_blocks:
                m = block(m, bias=bias)
            r, bias = self.queries.expand(len(h), -1, -1).to(m.dtype), F.pad(bias, (self.length, 0))
            for block in self.decoder_blocks:
                r = block(r, context=m, bias=bias)                            # keys: [queries, LLM tokens]
        r = self.norm(r)                                                      # (B, L, width)
        if not self.plain:
            present = self.present(r)[..., 0]
        return self.mean + self.std * self.out(r).float(), present.float(), self.pooled(r.mean(1)).float()


class AdaptedEncoder:
    """The LLM and the adapter in the place of a text encoder: captions -> features (B, L, text_dim), mask (B, L).

    read: `common.LLMEncoder`, or a cache of what it says; sees_padding: True of a U-ViT that was trained over the padding.
    """
    def __init__(self, read, adapter, sees_padding, precision):
        self.read, self.adapter, self.sees_padding, self.precision = read, adapter, sees_padding, precision
        self.device, self.dim, self.length = read.device, adapter.out.out_features, adapter.length

    def __call__(self, captions):
        h, mask = self.read(captions)
        with common.autocast(self.device, self.precision):
            y, present, _ = self.adapter(h, mask)
        real = (present > 0).cummin(1).values                                 # padding stands at the end
        real[:, 0] = True                                                    # CLIP's start token is always there
        return y, torch.ones_like(real) if self.sees_padding else real


# --------------------------------------------------------------------------------------------------------------- the loss
def cos_len(pred, target, seen, length_weight):
    """1 - mean cos(pred, target) + length_weight mean (|pred| - |target|)^2 over the seen tokens; pred, target (B, L, D), seen (B, L) bool."""
    pred, target = pred[seen], target[seen]
    lengths = F.mse_loss(pred.norm(dim=-1), target.norm(dim=-1))
    return 1 - F.cosine_similarity(pred, target, dim=-1).mean() + length_weight * lengths


def alignment_loss(s, adapter, h, h_mask, target, mask, sees_padding):
    """Stage 1: cos-len of the tokens that the U-ViT sees, whether the adapter knows which they are, and the pooled term.

    h (B, n, llm_dim), h_mask (B, n): of the text; target (B, L, text_dim), mask (B, L): of its English wording by the text encoder.
    """
    y, present, pooled = adapter(h, h_mask)
    loss = cos_len(y, target, torch.ones_like(mask) if sees_padding else mask, s.length_weight)
    if not sees_padding:
        loss = loss + F.binary_cross_entropy_with_logits(present, mask.float())
    if s.pooled_weight:                                                       # CLIP pools at its last token
        last = target[torch.arange(len(target)), mask.sum(1) - 1]
        loss = loss + s.pooled_weight * cos_len(pooled, last, torch.ones(len(last), dtype=torch.bool, device=last.device), s.length_weight)
    return loss


# ---------------------------------------------------------------------------------------------------------------- the data
def read_pairs(path):
    """[(text, English wording)] of a file with a JSON object a line. Raises UserError for a file that is no such."""
    return [(pair["text"], pair["english"]) for pair in common.read_json_lines(path, f"--parallel {path}", ("text", "english"))]


def pair_batches(s, captions, pairs, start):
    """The texts of stage 1: for each step from `start` on, [(text, its English wording)], the empty prompt first. The same for the same step."""
    share, captions = s.english if pairs else 1.0, [(text, text) for text in captions]
    for step in range(start, s.steps[0]):
        rng = random.Random(s.seed * 10**9 + step)
        yield [("", ""), *(rng.choice(captions if rng.random() < share else pairs) for _ in range(s.batch[0] - 1))]


def best_pictures(s, dataset):
    """Keeps of a data set the share `best` with the highest score, by the field or the file that `--quality` names."""
    names = [path.name for path, _, _ in dataset.items]
    in_file = Path(s.quality).suffix == ".json"
    scores = common.read_json(s.quality) if in_file else {name: image.get(s.quality) for name, (_, _, image) in zip(names, dataset.items)}
    missing = [name for name in names if not isinstance(scores, dict) or not isinstance(scores.get(name), (int, float))]
    if missing:
        raise UserError(f"--quality {s.quality}: {len(missing)} of {len(names)} pictures of the split {s.quality_split} have no score "
                        f"(first: {missing[0]}): name a field of the annotations, or a JSON file of {{file name: score}}")
    order = sorted(range(len(names)), key=lambda i: (-scores[names[i]], names[i]))
    dataset.items = [dataset.items[i] for i in order[:max(1, round(s.best * len(order)))]]
    return dataset


# ---------------------------------------------------------------------------------------------------------------- training
def text_losses(s, model, llm, clip, painter, pairs):
    """Stage 1: the alignment loss of a batch of pairs, in two parts, the short texts and the long ones, so that little is padded.

    Each part counts by its share of the texts. A generator: the first part's graph is freed before the second is built.
    """
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    usual = 4 * len(pairs[len(pairs) // 2][0])                                # long: more than four times the median, in letters
    short = sum(len(text) <= usual for text, _ in pairs) // 8 * 8             # in steps of 8: few different shapes, as in `Adapter`
    for part in (pairs[:short], pairs[short:]):
        if part:
            texts, english = map(list, zip(*part))
            inputs = *llm(texts), *clip(english)
            with common.autocast(painter.device, painter.precision):
                loss = alignment_loss(s, model["adapter"], *inputs, painter.encoder.sees_padding)
            yield loss * (len(part) / len(pairs))                             # out here, so that backward() does not run under autocast


def picture_losses(s, n, step, model, llm, painter, pictures, captions):
    """Stages 2 and 3: the diffusion loss of a batch of pictures, as in `uvit_fusion.train`."""
    base, diffusion, b = painter.settings, painter.diffusion, len(captions)
    generator = torch.Generator(painter.device).manual_seed((10 * s.seed + n) * 10**8 + step)
    uniform, normal = (functools.partial(draw, generator=generator, device=painter.device) for draw in (torch.rand, torch.randn))
    shape = (b, base.channels, base.size, base.size)
    dropped = (uniform(b) < s.drop).tolist()
    t = diffusion.times(uniform(b), base.time_power)
    eps, x_0 = normal(shape), painter.to_x_0(pictures, normal(shape) if painter.autoencoder else None)
    encoder = AdaptedEncoder(llm, model["adapter"], painter.encoder.sees_padding, painter.precision)
    with torch.set_grad_enabled(n == 2):                                      # in stage 3 the adapter is frozen
        text, mask = encoder(["" if drop else caption for drop, caption in zip(dropped, captions)])
    with common.autocast(painter.device, painter.precision):
        loss = diffusion.loss(functools.partial(model["uvit"], text=text, mask=mask), x_0, t, eps)
    return [loss]                                                             # one part; see `text_losses`


def train(n, s, model, average, llm, clip, painter, data, state=None, save_every=500):
    """Runs stage n and writes stage<n>.safetensors and model.safetensors; a resumed stage ends as an uninterrupted one.

    model: ModuleDict of "adapter" and "uvit", its running average with which `painter` draws; llm: `common.LLMEncoder` or a cache of it;
    clip: the text encoder that is replaced; data: (captions, pairs) in stage 1, captioned pictures later; state: of an interrupted stage.
    """
    stage, folder = s.stage(n), painter.folder
    model.requires_grad_(False)
    trained = {1: model["adapter"], 2: model, 3: model["uvit"]}[n].requires_grad_(True)
    optimizers, start = uvit_fusion.make_optimizers(trained, stage), 0
    if state:
        common.load_into(model, state["model"], folder / "state.pt")
        common.load_into(average, state["average"], folder / "state.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start = state["step"]
    metrics, losses = common.Metrics(folder, ["step", "loss", "lr"], start, f"metrics{n}.csv"), []
    if n == 1:
        batches = pair_batches(s, *data, start)
    else:
        batches, broken = common.batches(data, stage.batch, start, stage.steps, 10 * s.seed + n), common.BrokenPictures(len(data))
    with common.Interrupt() as interrupt, tqdm(total=stage.steps, initial=start, desc=f"stage {n}", unit="step") as progress:
        for step, batch in enumerate(batches, start + 1):
            uvit_fusion.set_rates(optimizers, stage, step)
            if n == 1:
                parts = text_losses(s, model, llm, clip, painter, batch)
            else:
                pictures, captions, unread = batch
                broken.add(unread, pictures)
                parts = picture_losses(s, n, step, model, llm, painter, pictures, captions)
            model.zero_grad()
            total = 0
            for loss in parts:
                loss.backward()
                total += loss.detach()
            losses.append(total)
            if s.clip_grad:
                torch.nn.utils.clip_grad_norm_(trained.parameters(), s.clip_grad)
            for optimizer in optimizers:
                optimizer.step()
            common.follow(average, model, min(s.ema, step / (step + 10)))     # closely at first
            progress.update()
            save = step % save_every == 0 or step == stage.steps or interrupt.asked
            if not save and step % 20:
                continue
            mean, losses = torch.stack(losses).mean().item(), []
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at step {step} of stage {n}; the last checkpoint stays as it was: try a lower --lr")
            metrics.add(step, mean, stage.lr * uvit_fusion.learning_rate(stage, step))
            progress.set_postfix(loss=f"{mean:.4f}")
            if save:
                with common.whole(folder / "state.pt") as unfinished:
                    torch.save({"stage": n, "step": step, "precision": str(painter.precision), "model": model.state_dict(),
                                "average": average.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, unfinished)
            if interrupt.asked and step < stage.steps:
                print(f"stopped after step {step} of stage {n}; to go on: the same command with --resume")
                sys.exit(130)
    model.load_state_dict(average.state_dict())                               # the next stage begins with what this one is judged by
    for name in ("model", f"stage{n}"):                                       # the last one says that the stage is done
        common.save_tensors(average.state_dict(), folder / f"{name}.safetensors")
    if interrupt.asked:
        print(f"stopped after stage {n}; to go on: the same command with --resume")
        sys.exit(130)


# ------------------------------------------------------------------------------------------------------------ checkpoints
def make(s, base, llm, folder, device, precision):
    """(ModuleDict of a new adapter and a U-ViT of the settings `base`, a painter that draws with it into `folder`)."""
    model = nn.ModuleDict({"adapter": Adapter(s, llm.dim, base.text_length, base.text_dim), "uvit": UViT(base)}).to(device)
    model.requires_grad_(False).eval()
    encoder = AdaptedEncoder(llm, model["adapter"], not base.mask_text, precision)
    return model, uvit_fusion.Painter(model["uvit"], encoder, base, Path(folder), device, precision)


def load(path, device, precision):
    """The painter of a run folder, or of a file such as stage1.safetensors in one. Raises UserError if the LLM is not the one it was made with."""
    folder, weights = common.run_files(path)
    s, base = common.read_settings(Settings, folder), common.read_settings(uvit_fusion.Settings, folder, "uvit.json")
    llm = common.LLMEncoder(s.llm, s.llm_layer, s.instruction, device, precision)
    if llm.identity != s.llm_identity:
        raise UserError(f"{folder}/ was made with another language model than {s.llm} is now: put back the one that it was trained with")
    model, painter = make(s, base, llm, folder, device, precision)
    common.load_into(model, common.read_weights(weights, f"checkpoint {weights}"), weights)
    return painter


# ----------------------------------------------------------------------------------------------------------------- grading
LANGUAGES = ("english", "spanish", "german", "chinese")


def tell(scenes, captions):
    """Prompts for validation scenes, the same each time: a list for each of LANGUAGES, for "long", and for "turns", the languages taking turns."""
    from toy import tellings
    told = {"english": captions, "long": [tellings.paragraph(scene, random.Random(i)) for i, scene in enumerate(scenes)]}
    told |= {language: [tellings.tell(scene, language, random.Random(i)) for i, scene in enumerate(scenes)] for language in LANGUAGES[1:]}
    return told | {"turns": [told[LANGUAGES[i % 4]][i] for i in range(len(scenes))]}


def grade_stages(flagship, folder, args, data):
    """Draws held-out scenes, told in each way, from the same noise by the flagship's own text encoder and after each stage that was run.

    Prints a table and returns its figures. After the last stage each kind has its list; to compare the stages the four languages take turns in one.
    """
    import eval as grade
    scenes, captions, unseen = grade.validation_prompts(data, flagship.settings.size, args.samples)
    stages = [n for n in (1, 2, 3) if (folder / f"stage{n}.safetensors").exists()]
    kinds, prompts, figures, turns = (*LANGUAGES, "long"), tell(scenes, captions), {}, {}

    def draw(painter, kind, name):
        """The pictures, and which of them are right in all respects; the share of those is a figure of that name."""
        pictures = painter.draw(prompts[kind], steps=args.sample_steps, progress=True)
        right = grade.judged(pictures, scenes, unseen)[1]["all"]
        figures.update(grade.percent(name, right))
        return pictures, right
    for kind in kinds:
        draw(flagship, kind, f"clip_{kind}")
    for n in stages:
        painter = load(folder / f"stage{n}.safetensors", flagship.device, flagship.precision)
        turns[n] = draw(painter, "turns", f"stage{n}")
    for kind in kinds:
        draw(painter, kind, kind)
    figures["english_gap"] = figures["clip_english"] - figures["english"]
    figures |= {f"{language}_gap": figures["english"] - figures[language] for language in LANGUAGES[1:]}
    rows = [["all right, %", "own text encoder", "with the LLM", "+-"]]
    rows += [[kind, figures[f"clip_{kind}"], figures[kind], figures[f"{kind}_ci"]] for kind in kinds]
    rows += [[f"four languages, after stage {n}", "", figures[f"stage{n}"], figures[f"stage{n}_ci"]] for n in stages]
    grade.print_table(rows, f"{folder}: {len(scenes)} held-out scenes, {args.sample_steps} steps, guidance {flagship.settings.guidance:g}")
    if 2 in turns and 3 in turns:
        scorer = grade.Aesthetic(args.scorer, grade.ClipScorer(flagship.settings.clip, flagship.device))
        figures |= grade.percent("stage3_loss", turns[2][1] - turns[3][1])
        figures |= {"quality_before": float(scorer(turns[2][0]).mean()), "quality_after": float(scorer(turns[3][0]).mean())}
        print(f"stage 3: the scorer's mean quality from {figures['quality_before']:.3f} to {figures['quality_after']:.3f}; "
              f"right pictures lost, pair by pair: {figures['stage3_loss']:.1f} +- {figures['stage3_loss_ci']:.1f} points")
    return figures


def draw_prompts(painter, flagship, data, font=None):
    """Two grids of validation scenes drawn by the flagship's own text encoder and with the LLM: told in other languages, and at length."""
    import eval as grade
    import sample
    scenes, captions, _ = grade.validation_prompts(data, flagship.settings.size, 6)
    folder, sides = painter.folder / "samples", {"own text encoder": flagship, "with the LLM": painter}
    told, pictures, texts, rows = tell(scenes, captions), [], [], []
    for language in LANGUAGES:
        for name, side in sides.items():
            pictures, texts, rows = [*pictures, *side.draw(told[language])], texts + told[language], [*rows, f"{language}, {name}"]
    sample.picture_grid(pictures, texts, folder / "languages.png", len(scenes), sample.font(texts, font), rows)
    prompts = told["long"][:4]
    drawn = [side.draw(prompts) for side in sides.values()]
    sample.picture_grid([picture for pair in zip(*drawn) for picture in pair], list(sides) * 4, folder / "long.png", columns=2, titles=prompts)
    print(f"prompts in four languages and at length, drawn: {folder / 'languages.png'}, {folder / 'long.png'}")


ABLATIONS = {                                                                # name: (what is changed, stages)
    "adapter": ({}, (1,)),                                                   # as it is: reads the embeddings, layer 0
    "layer_first": ({"llm_layer": 1}, (1,)),
    "layer_middle": ({"llm_layer": 2}, (1,)),
    "layer_last": ({"llm_layer": -1}, (1,)),
    "no_mask": ({"mask": False}, (1,)),
    "no_window": ({"window": 1}, (1,)),
    "mlp": ({"adapter": "mlp"}, (1,)),
    "no_stage_1": ({}, (2,)),
}


def compare(s, flagship, data, folder, options, args):
    """Trains each ablation by stage 1 alone (and one by stage 2 alone), and grades it on four languages taking turns and on long prompts."""
    import eval as grade
    scenes, captions, unseen = grade.validation_prompts(data, flagship.settings.size, args.samples)
    told = tell(scenes, captions)
    rows, figures = [["all right, %", "four languages", "+-", "long", "english"]], {}
    for name, (changed, stages) in ABLATIONS.items():
        painter = run(dataclasses.replace(s, **changed), flagship, data, folder / name, common.pick_up(options, folder / name), stages)
        right = {kind: grade.judged(painter.draw(told[kind], steps=args.sample_steps, progress=True), scenes, unseen)[1]["all"]
                 for kind in ("turns", "long", "english")}
        figures |= grade.percent(name, right["turns"]) | {f"{name}_{kind}": 100 * float(right[kind].mean()) for kind in ("long", "english")}
        rows.append([name, *(figures[f"{name}{end}"] for end in ("", "_ci", "_long", "_english"))])
        grade.write_results(folder, figures)
    grade.print_table(rows, f"{folder}: {len(scenes)} held-out scenes, stage 1 alone ({s.steps[0]} steps); no_stage_1: stage 2 alone ({s.steps[1]})")


# -------------------------------------------------------------------------------------------------------------------- main
def run(s, flagship, data, folder, options, stages, init=None, features=None):
    """Runs stages in a run folder; returns its painter. init: a file of another run to start from; features: folder of a cache of LLM features."""
    base, device, precision = flagship.settings, flagship.device, flagship.precision
    llm = common.LLMEncoder(s.llm, s.llm_layer, s.instruction, device, precision)
    s = dataclasses.replace(s, llm_identity=llm.identity, base_identity=flagship.identity())
    pairs = read_pairs(s.parallel) if s.parallel else []
    pictures = flagship.data(data, "train") if 2 in stages else common.CaptionedImages(data, "train", base.size)
    captions = [text for _, texts, _ in pictures.items for text in texts]
    sources = {1: (captions, pairs), 2: pictures}
    if 1 in stages and not pairs:
        print("warning: no --parallel: stage 1 sees English captions alone, and other languages are left to what the LLM makes of them")
    if 3 in stages:                                                           # refused, if need be, before anything is trained
        sources[3] = best_pictures(s, flagship.data(data, s.quality_split))
    if features:
        llm = common.CachedLLM(llm, ["", *captions, *(text for text, _ in pairs)], features)
    torch.manual_seed(s.seed)
    average, painter = make(s, base, llm, folder, device, precision)
    # the adapter's features begin on the scale of those that they replace
    clip, mask = flagship.encoder(random.Random(s.seed).choices(captions, k=512))
    seen = clip[mask] if base.mask_text else clip.flatten(0, 1)
    average["adapter"].mean.copy_(seen.mean(0))
    average["adapter"].std.copy_(seen.std(0))
    average["uvit"].load_state_dict(flagship.model.state_dict())
    if init:
        common.load_into(average, common.read_weights(init, f"--init {init}"), init)
    state, done = common.open_run(folder, s, options, precision), 0
    common.write_json(folder / "uvit.json", dataclasses.asdict(base))
    if state:
        common.load_into(average, state["average"], folder / "state.pt")
        stopped = state["stage"]
        done = stopped - (not (folder / f"stage{stopped}.safetensors").exists())
        if done < stopped and stopped not in stages:
            raise UserError(f"--resume: stage {stopped} stopped after step {state['step']}: finish it first, with --stages {stopped} --resume")
    model = copy.deepcopy(average)
    for n in stages:
        if n > done:
            train(n, s, model, average, llm, flagship.encoder, painter, sources[n], state if state and state["stage"] == n else None)
    return painter


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    action.add_argument("--train", action="store_true", help="run the stages, draw prompts of four languages and, on the toy world, grade them")
    action.add_argument("--compare", action="store_true", help="train and grade the ablations (long)")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3), help="stages to run (default all)")
    parser.add_argument("--init", help="a stage's file of another run, to start from")
    parser.add_argument("--samples", type=common.positive, default=2048, help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10, help="network evaluations a graded picture (default %(default)s)")
    parser.add_argument("--scorer", default="runs/toy/quality.safetensors", help="linear head on CLIP features that tells a picture's quality")
    parser.add_argument("--font", help="font file for the captions of pictures, for letters that the system's own lack")
    parser.add_argument("--features", help="folder for the LLM's features of all texts, computed once: pays for a large LLM (default: none)")
    common.add_training_flags(parser, Settings, PRESETS, "run folder (default runs/llm_adapter; --compare: runs/llm_compare)", "resume", "overwrite")
    args = parser.parse_args()
    if not (args.train or args.compare):
        parser.print_help()
        return
    import eval as grade
    import sample
    import toy
    s, options = common.make_settings(Settings, PRESETS, args), common.make_settings(common.Options, None, args)
    folder = Path(args.out or ("runs/llm_compare" if args.compare else "runs/llm_adapter"))
    if args.train:
        common.check_run(folder, options)
    flagship = sample.load_or_train(s.base, args.device, args.precision)
    data = toy.prepare(s.data, flagship.settings.clip, flagship.side, s.llm)
    if s.data == "shapes" and not s.parallel:
        s.parallel = f"{data}/annotations/parallel_train2017.jsonl"
    begin = time.time()
    if args.compare:
        compare(s, flagship, data, folder, options, args)
        return
    painter = run(s, flagship, data, folder, options, sorted(args.stages), args.init, args.features)
    if s.data == "shapes":
        draw_prompts(painter, flagship, data, args.font)
        figures = grade_stages(flagship, folder, args, data)
        grade.write_results(folder, figures | {"seconds": time.time() - begin})
        print(f"{time.time() - begin:.0f} s beyond the flagship and the LLM; figures in {folder / 'results.json'}")
    else:
        grade.report(painter, data, args.samples, begin, __file__)


if __name__ == "__main__":
    common.entry(main)
