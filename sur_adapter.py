r"""Narrative prompts understood: an adapter on the text features, aligned to keyword prompts and distilled from an LLM (arXiv 2305.05189).

The idea. "A trio of balls the colour of grass" says what "green, circle, x3" says, but a text-to-image model that has only learned the second
does not know it. SUR, an adapter for semantic understanding and reasoning, sits between the frozen text encoder and the frozen network and
learns from triples (narrative prompt v, keyword prompt k, picture): the picture must come out, v must come to look as k does, and the adapter's
own states must tell what an LLM thinks of v. When drawing no LLM is needed.

    x = text encoder(v)                                        (B, L, d), frozen
    h = transformer encoder(x)                                 (B, L, d)
    w = softmax((W_q h) (W_k x)^T / sqrt(d)) x + h             (B, L, d)
    a = W_2 relu(W_1 w) + w                                    (B, L, d)
    y = x + eta fc(a)                                          (B, L, d), in the place of x; fc begins at zero, so y = x

    D(teacher, student) = T^2 KL(softmax student / T || softmax teacher / T), over the d features of a token; T: temperature
                          summed over the tokens, mean over the batch
    L = noise_weight | network(x_t, t, y) - target |^2  +  prompt_weight D(text encoder(k), y)  +  llm_weight D(mean of LLM(v), P h)

P is a linear map to the LLM's width. Prompts and the empty prompt go through the adapter alike.

    python sur_adapter.py --train                             # on the flagship in runs/uvit_fusion: 5 min on two CPU cores, 79 % of narratives right
    python sur_adapter.py --compare                           # what each term gives, and what the defects of the release cost, in one table
    python sample.py "a trio of balls the colour of grass" --adapter runs/sur_adapter
    python sur_adapter.py --train --preset paper --base runs/coco --data path/to/SURD --llm path/to/vicuna-13b

Differs from the paper (what its released code does in brackets; `--as-released` brings the first five back):
 1. The noise loss reaches the adapter [it was cut off the graph, so that only the two weak terms below trained it].
 2. The encoder attends over the tokens of a prompt, padding masked [over the batch: its axes were exchanged].
 3. P maps the adapter's states to the LLM's width, is trained and saved. [A random map of the LLM's state to width d, frozen, not saved.] If the
    map of the LLM's side is trained instead, it can shrink what it teaches until there is nothing to learn: see --compare.
 4. y = x + eta fc(a), the identity at the start [(1 - eta) x + eta fc(a), which is not].
 5. w adds h [x: then the encoder's states only say where one attention of one head looks, and nothing that they found out gets through; see
    "paper_w" in --compare; --residual x].
 6. toy: eta 1, weights 3, 0.2 and 0.02 [0.1; 1, 1e-5 and 1e-5]; with the noise loss mended they had to be tuned again. The distances are taken
    at temperature 4 [1].
 7. toy: width 128, 4 heads, feed-forward 96 [768, 8, 2048]; norms before the layers, which begin as the identity but for their biases [behind
    them], GELU [ReLU]; no dropout [0.1, also when drawing]; Muon 0.02 on the matrices, AdamW 2e-3 on the rest [AdamW 1e-5].
 8. Captions are dropped with p = 0.1 [never], so that the empty prompt, which guides, stays what it was.
 9. Where the network does not see padding, tokens behind the end of k are aligned to its last one.
10. The toy world's triples hold plain captions as well, each its own keyword prompt: plain prompts shall stay as they are.
11. toy: the noise loss is taken of a part of each batch [of all].
"""
import argparse
import copy
import csv
import dataclasses
import functools
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import common
import uvit_fusion
from common import UserError, setting
from uvit_fusion import Attention, softmax_attention


@dataclass
class Settings:
    """Everything that makes a run: saved as config.json, read back by whatever loads the run."""
    # what it stands on
    base: str = setting("runs/uvit_fusion", "run of uvit_fusion.py whose text encoder gets the adapter")
    llm: str = setting("runs/toy/llm", "language model that is distilled: a folder in the Hugging Face format or a name on its hub")
    llm_layer: int = setting(-2, "whose states are distilled: 0 the embeddings, -1 the last layer")
    # the adapter
    layers: int = setting(2, "of the transformer encoder", low=0)
    heads: int = setting(4, "attention heads", low=1)
    feed_forward: int = setting(96, "width of the encoder's feed-forward layers", low=1)
    residual: str = setting("h", 'what is added to the attention in w: "h", or "x" as in the paper', choices=("h", "x"))
    eta: float = setting(1.0, "share of the adapter in its output", above=0)
    projection: str = setting("student", '"student": a trained map of the adapter\'s states to the LLM\'s width; "teacher": a trained map of the '
                              'LLM\'s to the adapter\'s; "frozen": the same, not trained', choices=("student", "teacher", "frozen"))
    as_released: bool = setting(False, "repeat the defects of the released code: no gradient from the noise loss, attention over the batch, "
                                "a frozen projection, no identity at the start, x in w")
    # the loss
    noise_weight: float = setting(3.0, "weight of the noise loss", low=0)
    prompt_weight: float = setting(0.2, "weight of the distance to the keyword prompt", low=0)
    llm_weight: float = setting(0.02, "weight of the distance to the LLM", low=0)
    temperature: float = setting(4.0, "T, of both distances: at 1 they hardly see features below zero", above=0)
    # the training
    steps: int = setting(2800, "training steps", low=1)
    batch: int = setting(64, "triples a step", low=1)
    pictures: int = setting(16, "of them whose noise loss is computed, which takes far longer than the other terms", low=1)
    optimizer: str = setting("muon", '"adamw", or "muon" for the adapter\'s matrices and AdamW for the rest', choices=("adamw", "muon"))
    lr: float = setting(2e-3, "highest learning rate of AdamW", above=0)
    muon_lr: float = setting(2e-2, "and of Muon", above=0)
    warmup: int = setting(50, "steps of linear warm-up", low=0)
    decay: float = setting(1.0, "share of the steps, at the end, over which the rate falls to zero along a cosine", low=0, high=1)
    weight_decay: float = setting(0.01, "of AdamW", low=0)
    betas: tuple = setting((0.9, 0.99), "of AdamW", low=0, high=0.99999)
    clip_grad: float = setting(1.0, "largest norm of the gradient (0: no clipping)", low=0)
    ema: float = setting(0.99, "decay of the running average of the weights (0: none)", low=0, high=1)
    drop: float = setting(0.1, "share of prompts replaced by the empty one", low=0, high=1)
    seed: int = setting(0, "of weights, order and noise", low=0, high=10**6)
    # what it is trained on
    data: str = setting("shapes", '"shapes" (the toy world), or a folder of pictures with metadata.jsonl, see `triples`')
    base_identity: str = ""        # of the network and its text encoder, down to the weights; set from them, as is the next
    llm_identity: str = ""
    llm_dim: int = 0
    method: str = "sur_adapter"

    def __post_init__(self):
        """Raises UserError for settings that are out of range or do not fit together."""
        common.check_limits(self)
        if self.pictures > self.batch:
            raise UserError(f"--pictures {self.pictures}: choose --batch, {self.batch}, or less")


PRESETS = {
    "toy": {},
    # the values of the release; the network was Stable Diffusion 1.5, the LLM a LLaMA of 13 billion parameters
    "paper": dict(base="runs/coco", llm="lmsys/vicuna-13b-v1.5", heads=8, feed_forward=2048, residual="x", eta=0.1, noise_weight=1.0,
                  prompt_weight=1e-5, llm_weight=1e-5, temperature=1.0, steps=5000, batch=4, pictures=4, optimizer="adamw", lr=1e-5, warmup=0,
                  decay=0.0, betas=(0.9, 0.999), ema=0.0, drop=0.0, data="SURD"),
}


# ------------------------------------------------------------------------------------------------------------ the adapter
class EncoderBlock(nn.Module):
    """A pre-norm layer of the transformer encoder, h (B, L, d) -> (B, L, d), with a narrow feed-forward part.

    It begins as the identity but for its biases.
    """
    def __init__(self, dim, heads, feed_forward):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, feed_forward), nn.GELU(), nn.Linear(feed_forward, dim))
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.mlp[2].weight)

    def forward(self, h, bias=None):
        h = h + self.attn(self.norm1(h), bias=bias)
        return h + self.mlp(self.norm2(h))


class Adapter(nn.Module):
    """Text features x (B, L, d), mask (B, L) -> y (B, L, d), which takes their place, and the encoder's states h (B, L, d).

    d: `dim`; llm_dim: width of the LLM that is distilled. A padded token changes no other token, a prompt no other prompt.
    """
    def __init__(self, s, dim, llm_dim):
        super().__init__()
        if dim % s.heads:
            raise UserError(f"--heads {s.heads} cannot share text features of {dim}: choose a divisor of it")
        self.eta, self.released, self.projection = s.eta, s.as_released, "frozen" if s.as_released else s.projection
        self.carries_states = s.residual == "h" and not s.as_released
        self.encoder_blocks = nn.ModuleList(EncoderBlock(dim, s.heads, s.feed_forward) for _ in range(s.layers))
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.fc = nn.Linear(dim, dim)
        self.project = nn.Linear(dim, llm_dim) if self.projection == "student" else nn.Linear(llm_dim, dim)      # P
        nn.init.zeros_(self.fc.weight)
        if not s.as_released:
            nn.init.zeros_(self.fc.bias)

    def forward(self, x, mask):
        bias = torch.zeros(mask.shape, device=x.device)                                    # (B, L), added to the logits of the keys
        if self.released:
            h = x.transpose(0, 1)                                                          # taken for B tokens of L prompts: that was the
            for block in self.encoder_blocks:                                              # release's attention over the batch
                h = block(h)
            h = h.transpose(0, 1)
        else:
            h, bias = x, bias.masked_fill(~mask, -math.inf)
            for block in self.encoder_blocks:
                h = block(h, bias[:, None, None])                                          # (B, L, d)
        # w = softmax((W_q h) (W_k x)^T / sqrt(d)) x + h
        w = softmax_attention(self.query(h), self.key(x), x, bias[:, None]) + (h if self.carries_states else x)      # (B, L, d)
        a = self.mlp(w) + w                                                                # a = W_2 relu(W_1 w) + w
        o = self.fc(a).float()
        return ((1 - self.eta) * x if self.released else x) + self.eta * o, h.float()      # y = x + eta fc(a)


class AdaptedEncoder:
    """A text encoder with the adapter behind it: captions -> features (B, L, d), mask (B, L)."""
    def __init__(self, encoder, adapter, precision):
        self.encoder, self.adapter, self.precision = encoder, adapter, precision
        self.device, self.dim, self.length = encoder.device, encoder.dim, encoder.length

    def __call__(self, captions):
        x, mask = self.encoder(captions)
        with common.autocast(self.device, self.precision):
            return self.adapter(x, mask)[0], mask


# --------------------------------------------------------------------------------------------------------------- the loss
def divergence(teacher, student, seen, temperature=1.0):
    """D = T^2 KL(softmax student / T || softmax teacher / T) over features (B, L, d), summed over the seen tokens (B, L), mean over the batch.

    The release's order, in which the student is asked to put nothing where the teacher has nothing.
    """
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * ((log_p.exp() * (log_p - log_q)).sum(-1) * seen).sum() / len(seen)


def behind_the_end(target, mask):
    """Features (B, L, d) in which the tokens behind the end of a prompt, mask (B, L), are its last one again."""
    places = torch.arange(mask.shape[1], device=mask.device).minimum(mask.sum(1, keepdim=True) - 1)             # (B, L)
    return target.gather(1, places[..., None].expand_as(target))


def losses(s, adapter, painter, narratives, prompts, thoughts, x_0, t, eps):
    """The three terms of the loss, unweighted: {"noise", "prompt", "llm"}; those of weight 0 are left out.

    narratives, prompts: (features (B, L, d), mask (B, L)) of the text encoder; thoughts (B, llm_dim): the LLM's of the narratives; x_0, eps
    (b, C, S, S), t (b,): as in `uvit_fusion.Diffusion.loss`, of the first b <= B; painter: of the base, which is frozen.
    """
    (x, mask), (target, target_mask) = narratives, prompts
    seen, terms, b = torch.ones_like(mask), {}, len(t)
    if painter.settings.mask_text:                                            # a network that sees padding is taught what to see there
        seen, target = mask, behind_the_end(target, target_mask)
    with common.autocast(painter.device, painter.precision):
        y, h = adapter(x, mask)
        if s.noise_weight:
            text = (y.detach() if s.as_released else y)[:b]
            terms["noise"] = painter.diffusion.loss(functools.partial(painter.model, text=text, mask=mask[:b]), x_0, t, eps)
        if s.prompt_weight:
            terms["prompt"] = divergence(target, y, seen, s.temperature)
        if s.llm_weight and adapter.projection == "student":
            terms["llm"] = divergence(thoughts[:, None], adapter.project(h), seen, s.temperature)
        elif s.llm_weight:
            terms["llm"] = divergence(adapter.project(thoughts)[:, None], h, seen, s.temperature)
    return terms


# ---------------------------------------------------------------------------------------------------------------- training
def think(llm, texts):
    """The mean over its tokens of the LLM's states of each text: a list of B -> (B, llm_dim)."""
    features, mask = llm(texts)
    return (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Remembered:
    """A frozen function of texts, a list of B -> tensors (B, ...), that keeps its values, up to 1 GB: a data set's texts come many times."""
    def __init__(self, function, most=1e9):
        self.function, self.kept, self.left = function, {}, most

    def __call__(self, texts):
        new = [text for text in dict.fromkeys(texts) if text not in self.kept]
        fresh = dict(zip(new, zip(*self.function(new)))) if new else {}
        self.left -= sum(tensor.nbytes for values in fresh.values() for tensor in values)
        if self.left >= 0:
            self.kept |= fresh
        return [torch.stack(tensors) for tensors in zip(*(fresh.get(text) or self.kept[text] for text in texts))]


def triples(painter, data, split):
    """The captioned pictures of a split, whose captions are pairs (narrative, keyword prompt). Raises UserError if the data hold none."""
    dataset = painter.data(data, split)
    if not all(isinstance(note.get("prompt"), str) for _, _, note in dataset.items):
        raise UserError(f'--data {data}: expected a folder of pictures with metadata.jsonl, each line {{"file_name": ..., "text": (narrative), '
                        '"prompt": (keywords)}')
    dataset.items = [(path, [(text, note["prompt"]) for text in texts], note) for path, texts, note in dataset.items]
    return dataset


def train(s, painter, llm, dataset, folder, options):
    """Trains an adapter for a frozen base and fills the run folder; returns a painter that draws with its averaged weights.

    painter: of the base; llm: `common.LLMEncoder` or a cache of it; dataset: of `triples`. What step n does depends on the settings and on n alone.
    """
    import sample  # here, since it imports method files
    folder, base, device, diffusion = Path(folder), painter.settings, painter.device, painter.diffusion
    if s.batch % options.accumulate or s.pictures % options.accumulate:
        raise UserError(f"--batch {s.batch} and --pictures {s.pictures} cannot be worked through in {options.accumulate} equal parts: "
                        "choose multiples of --accumulate")
    torch.manual_seed(s.seed)
    adapter = Adapter(s, painter.encoder.dim, llm.dim).to(device)
    average = copy.deepcopy(adapter).requires_grad_(False)
    adapter.project.requires_grad_(adapter.projection != "frozen")
    optimizers, start = uvit_fusion.make_optimizers(adapter, s, lambda name: not name.startswith("project")), 0
    state = common.open_run(folder, s, options, painter.precision)
    if state:
        for module, name in ((adapter, "adapter"), (average, "average")):
            common.load_into(module, state[name], folder / "state.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start = state["step"]
    names = [name for name in ("noise", "prompt", "llm") if getattr(s, f"{name}_weight")]
    metrics, broken = common.Metrics(folder, ["step", "lr", *names], start), common.BrokenPictures(len(dataset))
    generator, sums = torch.Generator(device), []
    encoder, thinker = Remembered(painter.encoder), Remembered(lambda texts: (think(llm, texts),))
    shape = s.pictures, base.channels, base.size, base.size
    uniform, normal = (functools.partial(draw, generator=generator, device=device) for draw in (torch.rand, torch.randn))
    loader = common.batches(dataset, s.batch, start, s.steps, s.seed, options.workers)
    with common.Interrupt() as interrupt, tqdm(total=s.steps, initial=start, desc="adapter", unit="step") as progress:
        for step, (pictures, texts, unread) in enumerate(loader, start + 1):
            broken.add(unread, pictures)
            uvit_fusion.set_rates(optimizers, s, step)
            generator.manual_seed(s.seed * 10**9 + step)
            dropped = (uniform(s.batch) < s.drop).tolist()
            t = diffusion.times(uniform(s.pictures), base.time_power)          # as the base was trained
            eps, x_0 = normal(shape), painter.to_x_0(pictures[:s.pictures], normal(shape) if painter.autoencoder else None)
            texts = [("", "") if drop else pair for drop, pair in zip(dropped, texts)]
            adapter.zero_grad()
            for part in range(options.accumulate):
                some, few = (slice(part * n // options.accumulate, (part + 1) * n // options.accumulate) for n in (s.batch, s.pictures))
                narratives, prompts = map(list, zip(*texts[some]))
                thoughts = thinker(narratives)[0] if s.llm_weight else None
                terms = losses(s, adapter, painter, encoder(narratives), encoder(prompts), thoughts, x_0[few], t[few], eps[few])
                loss = sum(getattr(s, f"{name}_weight") * term for name, term in terms.items()) / options.accumulate
                if loss.requires_grad:                                        # as released, the noise loss alone would train nothing
                    loss.backward()
                sums.append(torch.stack([terms[name].detach() for name in names]))
            if s.clip_grad:
                torch.nn.utils.clip_grad_norm_(adapter.parameters(), s.clip_grad)
            for optimizer in optimizers:
                optimizer.step()
            common.follow(average, adapter, min(s.ema, step / (step + 10)))   # closely at first
            progress.update()
            save = step % options.save_every == 0 or step == s.steps or interrupt.asked
            if not save and step % 20:
                continue
            means, sums = torch.stack(sums).mean(0).tolist(), []
            if not all(map(math.isfinite, means)):
                raise UserError(f"the loss is {means} at step {step}; the last checkpoint stays as it was: try a lower --lr")
            metrics.add(step, s.lr * uvit_fusion.learning_rate(s, step), *means)
            progress.set_postfix({name: f"{mean:.4f}" for name, mean in zip(names, means)})
            if save:
                common.save_tensors(average.state_dict(), folder / "model.safetensors")
                with common.whole(folder / "state.pt") as unfinished:
                    torch.save({"adapter": adapter.state_dict(), "average": average.state_dict(), "step": step, "precision": str(painter.precision),
                                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, unfinished)
                sample.plot({name: metrics.column(name) for name in names}, folder / "loss.png", "step", "terms of the loss", log=True)
            if interrupt.asked and step < s.steps:
                print(f"stopped after step {step}; to go on: the same command with --resume")
                sys.exit(130)
    return adapted(painter, average.eval(), folder)


# ------------------------------------------------------------------------------------------------------------ checkpoints
def adapted(painter, adapter, folder):
    """The painter of a base with an adapter behind its text encoder."""
    painter = copy.copy(painter)
    painter.encoder, painter.folder = AdaptedEncoder(painter.encoder, adapter, painter.precision), Path(folder)
    return painter


def attach(painter, path):
    """A painter that draws with the adapter of a run folder, or of a .safetensors file in one. Raises UserError if it was made for another base."""
    folder, weights = common.run_files(path)
    s = common.read_settings(Settings, folder)
    if s.base_identity != painter.identity():
        raise UserError(f"the adapter in {folder}/ was made for {s.base} as it was then, not for this network and text encoder: "
                        "name the base that it was made for with --run, or train it anew")
    adapter = Adapter(s, painter.encoder.dim, s.llm_dim).to(painter.device).eval().requires_grad_(False)
    common.load_into(adapter, common.read_weights(weights, f"checkpoint {weights}"), weights)
    return adapted(painter, adapter, folder)


def load(path, device, precision):
    """The painter of a run folder, or of a .safetensors file in one, on the base that it names."""
    folder, _ = common.run_files(path)
    return attach(uvit_fusion.load(common.read_settings(Settings, folder).base, device, precision), path)


# ----------------------------------------------------------------------------------------------------------------- grading
def riddles(scenes):
    """A narrative for each validation scene, the same each time, with a pair of facts that never met in training."""
    from toy import tellings
    return [tellings.narrative(scene, random.Random(i), unseen=True) for i, scene in enumerate(scenes)]


def grade_adapter(base, painter, data, samples, steps):
    """Draws held-out scenes, told as narratives and as plain captions, with the base and with the adapter, from the same noise.

    Prints a table and returns its figures.
    """
    import eval as grade
    from toy.shapes import FIELDS
    scenes, captions, unseen = grade.validation_prompts(data, base.settings.size, samples)
    told, drawn, right = {"narrative": riddles(scenes), "plain": captions}, {}, {}
    for side, who in (("base_", base), ("", painter)):
        for kind, prompts in told.items():
            drawn[side + kind] = who.draw(prompts, steps=steps, progress=True)
            right[side + kind] = grade.judged(drawn[side + kind], scenes, unseen)[1]
    figures, rows = {}, [["right, %", "base", "with the adapter", "+-"]]
    for kind, field, name in (("plain", "all", "plain"), ("narrative", "all", "narrative"), *(("narrative", field, field) for field in FIELDS[:4])):
        before, after = grade.percent(f"base_{name}", right[f"base_{kind}"][field]), grade.percent(name, right[kind][field])
        figures |= before | after
        rows.append([f"{kind}, {field}", before[f"base_{name}"], *after.values()])
    figures |= grade.percent("plain_loss", right["base_plain"]["all"] - right["plain"]["all"])
    figures["narrative_share"] = 100 * figures["narrative"] / figures["base_plain"]
    weights, own = (sum(p.numel() for p in model.parameters()) for model in (base.model, painter.encoder.adapter))
    figures["adapter_share"] = 100 * own / weights
    clip = grade.ClipScorer(base.settings.clip, base.device)
    figures["distance_base"], figures["distance"] = grade.clip_distances(clip, data, drawn["base_plain"], drawn["plain"])
    grade.print_table(rows, f"{painter.folder}: {len(scenes)} held-out scenes, {steps} steps, guidance {base.settings.guidance:g}")
    print(f"narratives reach {figures['narrative_share']:.0f} % of the base's figure on plain captions, of which {figures['plain_loss']:.1f} +- "
          f"{figures['plain_loss_ci']:.1f} points are lost, pair by pair;\ntiny-CLIP distance of plain pictures to real ones "
          f"{figures['distance_base']:.4f}, with the adapter {figures['distance']:.4f}; it is {figures['adapter_share']:.1f} % of the base's size")
    return figures


def draw_riddles(base, painter, data):
    """A grid of narratives, drawn by the base, with the adapter, and by the base from the keyword prompts of the same scenes."""
    import eval as grade
    import sample
    from toy import shapes
    scenes, _, _ = grade.validation_prompts(data, base.settings.size, 8)
    told, keywords = riddles(scenes), [shapes.keywords(scene) for scene in scenes]
    pictures = np.concatenate([base.draw(told), painter.draw(told), base.draw(keywords)])
    path = painter.folder / "samples" / "narratives.png"
    sample.picture_grid(pictures, [""] * 8 + told + keywords, path, columns=8, titles=["base", "with the adapter", "base, keyword prompts"])
    print(f"narratives, drawn: {path}")


ABLATIONS = {                                                                # name: what is changed
    "as_intended": {},
    "as_released": {"as_released": True, "eta": 0.1},                        # at eta 1 it would drop the text: y = (1 - eta) x + ...
    "paper_w": {"residual": "x"},
    "no_llm": {"llm_weight": 0.0},
    "no_prompt": {"prompt_weight": 0.0},
    "no_noise": {"noise_weight": 0.0},
    "teacher": {"projection": "teacher"},
    "frozen": {"projection": "frozen"},
}


def compare(s, base, llm, dataset, data, folder, options, args):
    """Trains each ablation with the same steps and grades it on narratives and on plain captions, from the same noise, beside the base.

    "LLM term" in the table is the one at the end of the training.
    """
    import eval as grade
    scenes, captions, unseen = grade.validation_prompts(data, base.settings.size, args.samples)
    told, figures = {"narrative": riddles(scenes), "plain": captions}, {}
    rows = [["all right, %", "narratives", "+-", "plain", "LLM term"]]
    for name in ("base", *ABLATIONS):
        painter, term = base, ""
        if name in ABLATIONS:
            one, run = dataclasses.replace(s, **ABLATIONS[name]), folder / name
            painter = train(one, base, llm, dataset, run, common.pick_up(options, run))
            if one.llm_weight:
                with open(run / "metrics.csv", newline="") as file:
                    term = f"{float([*csv.DictReader(file)][-1]['llm']):.4f}"
        right = {kind: grade.judged(painter.draw(prompts, steps=args.sample_steps, progress=True), scenes, unseen)[1]["all"]
                 for kind, prompts in told.items()}
        figures |= grade.percent(name, right["narrative"]) | {f"{name}_plain": grade.percent("plain", right["plain"])["plain"]}
        rows.append([name, figures[name], figures[f"{name}_ci"], figures[f"{name}_plain"], term])
        grade.write_results(folder, figures)
    grade.print_table(rows, f"{folder}: {len(scenes)} held-out scenes, {s.steps} steps of training, {args.sample_steps} of drawing")


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    action.add_argument("--train", action="store_true", help="train the adapter, draw narratives and, on the toy world, grade them")
    action.add_argument("--compare", action="store_true", help="train and grade the ablations (long)")
    parser.add_argument("--samples", type=common.positive, default=2048, help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10, help="network evaluations a graded picture (default %(default)s)")
    parser.add_argument("--features", help="folder for the LLM's features of all narratives, computed once: pays for a large LLM (default: none)")
    common.add_training_flags(parser, Settings, PRESETS, "run folder (default runs/sur_adapter; --compare: runs/sur_compare)",
                              "resume", "overwrite", "accumulate")
    args = parser.parse_args()
    if not (args.train or args.compare):
        parser.print_help()
        return
    import eval as grade
    import sample
    import toy
    s, options = common.make_settings(Settings, PRESETS, args), common.make_settings(common.Options, None, args)
    folder = Path(args.out or ("runs/sur_compare" if args.compare else "runs/sur_adapter"))
    known = s.data == "shapes"
    if args.train:
        common.check_run(folder, options)
    elif not known:
        raise UserError("--compare grades with the exact judge of the toy world: without --data")
    if args.samples < 2:
        raise UserError("--samples 1: a distance between two sets of pictures needs more")
    base = sample.load_or_train(s.base, args.device, args.precision)
    data = toy.prepare(s.data, base.settings.clip, base.side, s.llm)
    begin = time.time()
    dataset = triples(base, Path(data) / "train2017" if known else data, "train")
    llm = common.LLMEncoder(s.llm, s.llm_layer, "", base.device, base.precision)
    s = dataclasses.replace(s, base_identity=base.identity(), llm_identity=llm.identity, llm_dim=llm.dim)
    if args.features:
        llm = common.CachedLLM(llm, ["", *(text for _, pairs, _ in dataset.items for text, _ in pairs)], args.features)
    if args.compare:
        compare(s, base, llm, dataset, data, folder, options, args)
        return
    painter = train(s, base, llm, dataset, folder, options)
    if known:
        draw_riddles(base, painter, data)
        grade.write_results(folder, grade_adapter(base, painter, data, args.samples, args.sample_steps) | {"seconds": time.time() - begin})
        print(f"{time.time() - begin:.0f} s beyond the flagship and the LLM; figures in {folder / 'results.json'}")
    else:
        grade.report(painter, data, args.samples, begin, __file__)


if __name__ == "__main__":
    common.entry(main)
