r"""The frozen generator as a few-shot matcher of pictures and texts, by its attention: Discriminative Stable Diffusion (arXiv 2305.10722).

The idea. A text-to-image network knows which pictures a text describes, or it could not draw them. So show it a picture with some noise and a
text, and look at the attention logits from the picture's patches to the words: where they are high, the words have found something. That is
the matching score. A few labelled examples teach the network to say more clearly what it knows: a low-rank change of its attention, a weight
for each attention head and learned prompt embeddings beside the caption. The network itself stays as it is, and no head is put on top.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps              the same few (t, eps) for all candidates
    S = Q K^T / sqrt(d)                                        (B, H, N, L) in each block that sees the text: N patches ask L words
    a = mean over patches of log sum exp over words S          (B, blocks, heads), padding masked, in float32
    score = mean over t of mean over (block, head) of w a      (B,); w = 1: zero-shot
    loss = max(0, margin + max score(wrong) - score(right))    the hardest of the wrong candidates, which share t and eps with the right one

Rivals, by the same network evaluations:
    denoising   - mean over t of |eps_theta(x_t, t, text) - eps|^2                            (Diffusion Classifier, arXiv 2303.16203)
    itm         the same less that of the empty text, + |eps_theta(x_t, t, "") - eps|^2       (DiffusionITM, arXiv 2305.16397)
    hybrid      score + mean |eps_theta(x_t, t, "") - eps| - mean |eps_theta(x_t, t, text) - eps|      (the release)

    python dsd.py --train                                      # on the flagship in runs/uvit_fusion: 5 min on two cores, 93 % of held-out pairs
    python dsd.py picture.png "two red circles" "two red squares"      # ranks texts, and draws where each word looked
    python dsd.py --groups winoground.jsonl                    # any groups of candidates: one text right of several, one picture, or two and two
    python dsd.py --comvg comvg.csv --pictures path/to/pictures
    python dsd.py --retrieval path/to/coco --pool-size 100     # R@1, 5, 10 of captions for pictures and of pictures for captions
    python dsd.py --train --preset paper --base runs/coco256 --data refcocog_train.jsonl --groups refcocog_val.jsonl

Differs from the paper (what its release does in brackets):
 1. A score is of one sample [the mean over the batch, the unconditional half included, which leaks the label].
 2. The right candidate stands anywhere; a tie, or nan, is wrong [it stands first, and ties go to the first]. Scores are float32.
 3. In training all candidates of a group share t and eps [each draws its own]. Padding is masked [all 77 keys count].
 4. The U-ViT joins text and patches by concatenation or cross-attention; of either it is the part of patches that ask and words that are asked,
    in all joint blocks [Stable Diffusion's cross-attention, the last of the way down, of the middle and of the way up].
 5. Learned prompts are further caption tokens, put before the others behind the caption blocks; they are not pooled [described, not released].
 6. toy: 4 values of t in 20..400 [10, 40 or 200 in 10..990]; AdamW 4e-3, 2e-2 for the weights of heads [1e-4]; margin 0.3 [0.1 to 0.2].
 7. Further wrong texts are taken from the other labelled pairs, those most alike in words [none]: they were written for another picture,
    though a few fit this one as well.
 8. Errors of a network that predicts x_0 or v are turned into errors of eps. A candidate is pruned once it is behind by more than two
    standard errors of the difference [Diffusion Classifier: all but five after 25 evaluations].
 9. Moving pictures by a pixel or two, as one does to have more of them, made it worse: 89 to 92 % of other training pairs for 94.
"""
import argparse
import copy
import dataclasses
import math
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import uvit_fusion
from common import UserError, setting


@dataclass
class Settings:
    """Everything that makes a run: saved as config.json, read back by whatever loads the run."""
    base: str = setting("runs/uvit_fusion", "run of uvit_fusion.py whose network matches")
    # the score
    pool: str = setting("lse", 'over the words of a text: "lse" (LogSumExp), "mean", "max", or "cosine", the mean of cos(q, k)',
                        choices=("lse", "mean", "max", "cosine"))
    blocks: str = setting("all", 'joint blocks that are looked at: "all" or their numbers, such as 0,2')
    heads: str = setting("all", 'attention heads that are looked at: "all" or their numbers')
    times: tuple = setting((20, 400), "lowest and highest t", low=1, high=uvit_fusion.Diffusion.T)
    evaluations: int = setting(4, "values of t, evenly spaced, and so network evaluations a candidate", low=1)
    # what is tuned
    prompts: int = setting(4, "learned prompt embeddings", low=0)
    head_weights: bool = setting(True, "learn a weight for each attention head")
    lora_rank: int = setting(4, "rank of the change of q, k, v and out of all attention (0: none)", low=0)
    # the training
    data: str = setting("shapes", '"shapes" (the toy world), or a file of groups of candidates, a JSON object a line: see --groups')
    shots: float = setting(256, "groups to learn from, the first of the file; below 1: a share of it", above=0)
    steps: int = setting(400, "training steps", low=1)
    batch: int = setting(16, "groups a step", low=1)
    negatives: int = setting(3, "wrong candidates a group: its own, then texts of other groups", low=1)
    margin: float = setting(0.3, "by which the right candidate shall be ahead", above=0)
    lr: float = setting(4e-3, "highest learning rate of AdamW", above=0)
    weight_lr: float = setting(2e-2, "and for the weights of the heads", above=0)
    warmup: int = setting(50, "steps of linear warm-up", low=0)
    decay: float = setting(1.0, "share of the steps, at the end, over which the rate falls to zero along a cosine", low=0, high=1)
    weight_decay: float = setting(0.01, "of AdamW, but for the weights of the heads", low=0)
    betas: tuple = setting((0.9, 0.99), "of AdamW", low=0, high=0.99999)
    clip_grad: float = setting(1.0, "largest norm of the gradient (0: no clipping)", low=0)
    seed: int = setting(0, "of weights, order and noise", low=0, high=10**6)
    base_identity: str = ""        # of the network and its text encoder, down to the weights; set from them
    method: str = "dsd"

    def __post_init__(self):
        common.check_limits(self)
        if self.times[0] > self.times[1]:
            raise UserError(f"--times {self.times[0]} {self.times[1]}: the lower comes first")


PRESETS = {
    "toy": {},
    # the values of the release, for RefCOCOg
    "paper": dict(base="runs/coco256", times=(10, 990), evaluations=10, prompts=0, head_weights=False, shots=0.05, negatives=9, lr=1e-4, warmup=0,
                  decay=0.0, betas=(0.9, 0.999), data="refcocog_train.jsonl"),
}


# -------------------------------------------------------------------------------------------------------------- the score
def pool(how, logits, q, k, mask):
    """Logits of patches and words (B, H, N, L), with their q (B, H, N, d) and k (B, H, L, d); mask (B, L), True on words -> (B, H) float32."""
    if how == "cosine":
        logits = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).transpose(-2, -1)
    logits, mask = logits.float(), mask[:, None, None]                                     # (B, 1, 1, L)
    if how in ("lse", "max"):
        logits = logits.masked_fill(~mask, -math.inf)
        return (logits.logsumexp(-1) if how == "lse" else logits.amax(-1)).mean(-1)
    return (logits.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)).mean(-1)


def chosen(text, count, flag):
    """The numbers that "all" or "0,2" names, out of `count`."""
    numbers = range(count) if text == "all" else [int(part) if part.isdecimal() else count for part in re.split(r"[,\s]+", text.strip())]
    if not all(number < count for number in numbers):
        raise UserError(f"{flag} {text}: choose all, or numbers from 0 to {count - 1} with commas between them")
    return list(numbers)


class Matcher(nn.Module):
    """The network of a painter, a frozen copy, that tells how well pictures and texts go together. What is tuned requires a gradient."""
    def __init__(self, s, painter):
        super().__init__()
        base = painter.settings
        self.s, self.painter, self.network = s, painter, copy.deepcopy(painter.model).requires_grad_(False)
        self.joint = range(base.image_blocks, base.depth + 1 - base.image_blocks)
        looked = torch.zeros(len(self.joint), base.heads, device=painter.device)
        for block in chosen(s.blocks, len(self.joint), "--blocks"):
            looked[block, chosen(s.heads, base.heads, "--heads")] = 1
        self.register_buffer("looked", looked / looked.sum())
        torch.manual_seed(s.seed)
        if s.lora_rank:
            common.add_lora(self.network, s.lora_rank)
        self.prompts = nn.Parameter(0.5 * torch.randn(s.prompts, base.dim, device=painter.device), requires_grad=s.prompts > 0)
        self.weight = nn.Parameter(torch.ones_like(looked), requires_grad=s.head_weights)      # w

    def tuned(self):
        """The parameters that are tuned, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def read(self, features, mask):
        """What the text encoder gives of texts -> caption tokens (B, P + L, D), the P learned ones first, and mask (B, P + L)."""
        with common.autocast(self.painter.device, self.painter.precision):
            y = self.network.encode_text(features, mask)                                   # once a text, not once a t
        return torch.cat([self.prompts.to(y.dtype).expand(len(y), -1, -1), y], dim=1), F.pad(mask, (len(self.prompts), 0), value=True)

    def look(self, x_t, t, y, mask):
        """x_t (B, C, S, S), t (B,), caption tokens and mask of `read` -> [(logits, q, k)] of patches and words, one a joint block, and the output."""
        record, (patches, first) = [], ((x_t.shape[-1] // self.network.patch)**2, len(self.prompts))
        with common.autocast(self.painter.device, self.painter.precision):
            output = self.network.denoise(x_t, t, y, mask, record)
        # keys: [time, text, patches], or [time, patches, text] where the text is asked by cross-attention
        begin = (1 + patches if self.network.cross else 1) + first
        words = slice(begin, begin + y.shape[1] - first)
        return [(logits[:, :, -patches:, words], q[:, :, -patches:], k[:, :, words]) for logits, q, k in (record[i] for i in self.joint)], output

    def forward(self, x_t, t, y, mask):
        """The score of each pair at its t, (B,), and the network's output (B, C, S, S)."""
        seen, output = self.look(x_t, t, y, mask)
        a = torch.stack([pool(self.s.pool, *part, mask[:, len(self.prompts):]) for part in seen], dim=1)     # (B, blocks, heads)
        return (self.looked * self.weight * a).sum((1, 2)), output.float()


def bank(painter, times, count, seed=0):
    """[(t, eps (C, S, S))] by which all candidates are compared: `count` values of t, evenly spaced, in an order left to chance; one: the middle."""
    s, generator = painter.settings, torch.Generator().manual_seed(seed)
    values = torch.linspace(*times, count) if count > 1 else torch.tensor([sum(times) / 2])
    values = values.round().long()[torch.randperm(count, generator=generator)]
    return [(t.to(painter.device), torch.randn(s.channels, s.size, s.size, generator=generator).to(painter.device)) for t in values]


# ------------------------------------------------------------------------------------------------------------- candidates
class Candidates:
    """Groups of candidates, ready to be scored: x_0 (P, C, S, S), texts, and all pairs (M, 2) of a picture and a text, with the group of each.

    groups: {"pictures": [path, ...], "texts": [...], "right": which is right, "kind": a name}; see `eval.read_groups`.
    """
    def __init__(self, groups, painter):
        self.groups, paths, texts, pairs = groups, {}, {}, []
        for group in groups:
            pairs.append([(paths.setdefault(path, len(paths)), texts.setdefault(text, len(texts)))
                          for path in group["pictures"] for text in group["texts"]])
        self.pictures = load_pictures(paths, painter.side)                                 # uint8 (P, 3, H, W)
        self.x_0, self.texts = to_x_0(painter, self.pictures), list(texts)
        self.pairs, self.group = torch.tensor(sum(pairs, [])), torch.tensor([g for g, some in enumerate(pairs) for _ in some])
        self.members = torch.arange(len(self.pairs)).split([len(some) for some in pairs])

    def split(self, scores):
        """Scores of all pairs (M,) -> for each group an array (its pictures, its texts)."""
        return [scores[members].view(len(group["pictures"]), -1).cpu().numpy() for group, members in zip(self.groups, self.members)]


def load_pictures(paths, side):
    """uint8 (N, 3, side, side). Raises UserError for one that cannot be read."""
    pictures = []
    for path in paths:
        try:
            pictures.append(torch.from_numpy(common.load_picture(path, side)).permute(2, 0, 1))
        except common.BROKEN as error:
            raise UserError(f"{path} cannot be read as a picture ({error})") from None
    return torch.stack(pictures)


@torch.no_grad()
def to_x_0(painter, pictures):
    """Pictures uint8 (N, 3, H, W) as the network sees them; of latents the mean."""
    if painter.autoencoder:
        parts = [painter.autoencoder.encode(common.to_float(some.to(painter.device))) for some in pictures.split(16)]
        moments = torch.cat([torch.stack(part, dim=1) for part in parts])                  # (N, 2, C, s, s)
        return painter.to_x_0(moments, torch.zeros_like(moments[:, 0]))
    return painter.to_x_0(pictures)


@torch.no_grad()
def evaluate(matcher, x_0, y, mask, t, eps, batch=256):
    """One network evaluation a pair: x_0 (B, C, S, S) with caption tokens y (B, L, D) -> the scores (B,) and eps_theta - eps (B, C, S, S)."""
    diffusion, scores, residuals = matcher.painter.diffusion, [], []
    for x, text, seen in zip(x_0.split(batch), y.split(batch), mask.split(batch)):
        times = t.expand(len(x))
        x_t = diffusion.q_sample(x, times, eps.expand_as(x))
        score, output = matcher(x_t, times, text, seen)
        scores.append(score)
        residuals.append(diffusion.predict(output, x_t, times)[1] - eps)
    return torch.cat(scores), torch.cat(residuals)


def fallen_behind(values, candidates, alive):
    """Takes out of `alive` (M,) those that are behind the best of their group by more than two standard errors; values (M, n), one noise a column.

    Not of groups of two and two, in which no candidate wins all.
    """
    for group, members in zip(candidates.groups, candidates.members):
        some = members[alive[members]]
        if len(some) > 1 and "right" in group:
            behind = values[some][values[some].mean(1).argmax()] - values[some]            # (candidates, n), 0 for the best
            alive[some] = behind.mean(1) <= 2 * behind.std(1) / behind.shape[1]**0.5


@torch.no_grad()
def scores(how, matcher, candidates, noises, prune=False):
    """The scores (M,) of all pairs of the candidates, "attention" or one of the rivals, and the network evaluations a group that they took.

    noises: of `bank`; prune: what has fallen behind the best of its group is evaluated no further, and gets -inf.
    """
    encoder, group, (place, told) = matcher.painter.encoder, candidates.group, candidates.pairs.T
    read = [matcher.read(*encoder(candidates.texts[i:i + 256])) for i in range(0, len(candidates.texts), 256)]
    (y, mask), (empty, empty_mask) = map(torch.cat, zip(*read)), matcher.read(*encoder([""]))
    values, alive, spent = torch.full((len(group), len(noises)), math.nan), torch.ones(len(group), dtype=torch.bool), 0
    for n, (t, eps) in enumerate(tqdm(noises, desc=how, unit="t", leave=False)):
        rows = alive.nonzero()[:, 0]
        if prune:                                                                          # whom nobody is left to be compared with has won
            rows = rows[group.bincount(alive.float())[group[rows]] > 1]
            if not len(rows):
                break
        score, residual = evaluate(matcher, candidates.x_0[place[rows]], y[told[rows]], mask[told[rows]], t, eps)
        spent += len(rows)
        if how in ("itm", "hybrid"):                                                       # the empty text, once a picture
            pictures, back = place[rows].unique(return_inverse=True)
            empties = empty.expand(len(pictures), -1, -1), empty_mask.expand(len(pictures), -1)
            without, spent = evaluate(matcher, candidates.x_0[pictures], *empties, t, eps)[1][back], spent + len(pictures)
        if how == "denoising":
            score = -residual.square().mean((1, 2, 3))
        elif how == "itm":
            score = without.square().mean((1, 2, 3)) - residual.square().mean((1, 2, 3))
        elif how == "hybrid":
            score = score + without.abs().mean((1, 2, 3)) - residual.abs().mean((1, 2, 3))
        values[rows, n] = score.float().cpu()
        if prune and n % 4 == 3:
            fallen_behind(values[:, :n + 1], candidates, alive)
    return torch.where(alive, values.nanmean(1), -math.inf), spent / len(candidates.groups)


# --------------------------------------------------------------------------------------------------------------- the loss
def hinge(right, wrong, margin):
    """max(0, margin + max wrong - right), mean over the groups: right (B,), wrong (B, n)."""
    return F.relu(margin + wrong.amax(1) - right).mean()


def alike(texts):
    """Which other texts have most words in common with each: for each of the texts up to 40 numbers."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    share = [[len(a & b) / max(1, len(a | b)) * (a is not b) for b in words] for a in words]
    return [sorted(range(len(texts)), key=lambda j: -row[j])[:40] for row in share]


# ---------------------------------------------------------------------------------------------------------------- training
def examples(candidates):
    """For each group the right pair (picture, text), its own wrong ones, and those of the right picture with texts of other groups."""
    near, found = alike(candidates.texts), []
    for group, members in zip(candidates.groups, candidates.members):
        own = candidates.pairs[members].tolist()
        right, told = own.pop(group["right"]), {text for _, text in candidates.pairs[members].tolist()}
        found.append((right, own, [[right[0], text] for text in near[right[1]] if text not in told]))
    return found


def train(s, matcher, candidates, folder, options):
    """Tunes a matcher on labelled groups and fills the run folder. What step n does depends on the settings and on n alone."""
    import sample  # here, since it imports method files
    folder, painter, found, start, losses = Path(folder), matcher.painter, examples(candidates), 0, []
    if (fewest := min(len(own) + len(others) for _, own, others in found)) < s.negatives:
        raise UserError(f"--negatives {s.negatives}: a group has {fewest} wrong candidates, those of other groups among them: choose fewer")
    features, mask = painter.encoder(candidates.texts)
    tuned = matcher.tuned()
    if not tuned:
        raise UserError("nothing is to be tuned: choose --prompts, --head-weights or --lora-rank")
    plain = [parameter for name, parameter in tuned.items() if name != "weight"]
    optimizer = torch.optim.AdamW([{"params": plain, "highest": s.lr, "weight_decay": s.weight_decay},
                                   {"params": [tuned["weight"]] if s.head_weights else [], "highest": s.weight_lr, "weight_decay": 0.0}],
                                  lr=s.lr, betas=s.betas)
    state = common.open_run(folder, s, options, painter.precision)
    if state:
        load_tuned(matcher, state["tuned"], folder / "state.pt")
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    metrics = common.Metrics(folder, ["step", "loss", "right", "lr"], start)
    with common.Interrupt() as interrupt, tqdm(total=s.steps, initial=start, desc="tuning", unit="step") as progress:
        for step in range(start + 1, s.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * uvit_fusion.learning_rate(s, step)
            rng, generator = random.Random(s.seed * 10**9 + step), torch.Generator(painter.device).manual_seed(s.seed * 10**9 + step)
            some = rng.sample(found, min(s.batch, len(found)))
            wrong = [(rng.sample(own, len(own)) + rng.sample(others, len(others)))[:s.negatives] for _, own, others in some]
            pairs = torch.tensor([[right, *them] for (right, _, _), them in zip(some, wrong)])                 # (B, 1 + n, 2)
            x_0, n = candidates.x_0[pairs[..., 0].flatten()], pairs.shape[1]
            # t and eps are drawn once a group: its candidates are compared at the same noise
            t = torch.randint(s.times[0], s.times[1] + 1, (len(pairs),), generator=generator, device=painter.device).repeat_interleave(n)
            eps = torch.randn((len(pairs), *x_0.shape[1:]), generator=generator, device=painter.device).repeat_interleave(n, dim=0)
            texts = pairs[..., 1].flatten()
            score = matcher(painter.diffusion.q_sample(x_0, t, eps), t, *matcher.read(features[texts], mask[texts]))[0].view(-1, n)
            loss = hinge(score[:, 0], score[:, 1:], s.margin)
            optimizer.zero_grad()
            loss.backward()
            if s.clip_grad:
                torch.nn.utils.clip_grad_norm_(tuned.values(), s.clip_grad)
            optimizer.step()
            losses.append(torch.stack([loss.detach(), (score[:, 0] > score[:, 1:].amax(1)).float().mean()]))
            progress.update()
            save = step % options.save_every == 0 or step == s.steps or interrupt.asked
            if not save and step % 20:
                continue
            (mean, share), losses = torch.stack(losses).mean(0).tolist(), []
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at step {step}; the last checkpoint stays as it was: try a lower --lr")
            metrics.add(step, mean, 100 * share, s.lr * uvit_fusion.learning_rate(s, step))
            progress.set_postfix(loss=f"{mean:.3f}", right=f"{100 * share:.0f} %")
            if save:
                common.save_tensors(matcher.tuned(), folder / "model.safetensors")
                with common.whole(folder / "state.pt") as unfinished:
                    torch.save({"tuned": matcher.tuned(), "optimizer": optimizer.state_dict(), "step": step, "precision": str(painter.precision)},
                               unfinished)
                sample.plot({"loss": metrics.column("loss")}, folder / "loss.png", "step", "hinge loss", log=True)
            if interrupt.asked and step < s.steps:
                print(f"stopped after step {step}; to go on: the same command with --resume")
                sys.exit(130)


# ------------------------------------------------------------------------------------------------------------ checkpoints
def load_tuned(matcher, tensors, path):
    """Puts tuned parameters into a matcher. Raises UserError, naming their file, if they are not those that it has."""
    tuned = matcher.tuned()
    common.load_into(matcher, {name: tensor for name, tensor in matcher.state_dict().items() if name not in tuned} | tensors, path)


def load(folder, device="auto", precision="auto", zero_shot=False):
    """The matcher of a run folder, on the base that it names; device, precision: as the flags name them. Raises UserError for a base that changed."""
    import sample
    s = common.read_settings(Settings, folder)
    painter = sample.load_run(s.base, device, precision)
    if s.base_identity != painter.identity():
        raise UserError(f"{folder}/ was tuned for {s.base} as it was then, not for this network and text encoder: tune it anew with --train")
    matcher = Matcher(untuned(s) if zero_shot else s, painter)
    if not zero_shot:
        weights = Path(folder) / "model.safetensors"
        load_tuned(matcher, common.read_weights(weights, f"checkpoint {weights}"), weights)
    return matcher.requires_grad_(False)


def untuned(s):
    """The settings of the zero-shot score."""
    return dataclasses.replace(s, prompts=0, head_weights=False, lora_rank=0)


# ----------------------------------------------------------------------------------------------------------------- grading
KINDS = ("count", "colour", "shape", "relation")


def ways(s, matcher, plain, clip, tuned_clip):
    """The ways to match, {name: (label, function of candidates -> scores (M,) and evaluations a group)}. matcher: tuned; plain: zero-shot."""
    import eval as grade
    low, high, painter = *s.times, plain.painter
    noises, one, everywhere = (bank(painter, *which) for which in ((s.times, s.evaluations), (s.times, 1), ((10, 990), 50)))
    middle, middle_one = (bank(painter, (600, 800), count) for count in (s.evaluations, 1))    # where it tells most, as training pairs show

    def by_clip(clip):
        return lambda candidates: (grade.clip_scores(clip, candidates.pictures, candidates.texts, candidates.pairs), 0.0)

    def by(how, matcher, noises, prune=False):
        return lambda candidates: scores(how, matcher, candidates, noises, prune)
    return {
        "clip_zero_shot": ("tiny CLIP, zero-shot", by_clip(clip)),
        "clip_few_shot": ("tiny CLIP, tuned on the same", by_clip(tuned_clip)),
        "zero_shot": (f"attention, zero-shot, t {low} to {high}", by("attention", plain, noises)),
        "accuracy": (f"attention, tuned, t {low} to {high}", by("attention", matcher, noises)),
        "accuracy_one": (f"attention, tuned, t {one[0][0]}", by("attention", matcher, one)),
        "hybrid": (f"hybrid, zero-shot, t {low} to {high}", by("hybrid", plain, noises)),
        "denoising": ("denoising error, t 10 to 990, pruned", by("denoising", plain, everywhere, prune=True)),
        "denoising_middle": ("denoising error, t 600 to 800", by("denoising", plain, middle)),
        "denoising_one": (f"denoising error, t {middle_one[0][0]}", by("denoising", plain, middle_one)),
        "itm": ("DiffusionITM, t 600 to 800", by("itm", plain, middle))}


def grade_toy(s, matcher, plain, clip, tuned_clip, data, samples, others):
    """Grades all ways to match on held-out groups of the toy world: prints two tables and returns their figures. samples: pairs of each kind."""
    import eval as grade
    notes, figures, known = Path(data) / "annotations", {}, ways(s, matcher, plain, clip, tuned_clip)
    rows = [["right, %", "evaluations", *KINDS, "all", "+-"]]
    candidates = Candidates(grade.read_groups(notes / "match_val.jsonl")[:4 * samples], plain.painter)
    kinds = np.array([group["kind"] for group in candidates.groups])
    for name, (label, way) in known.items():
        if name == "itm":
            continue                                                          # for texts of one picture it is the denoising error
        values, evaluations = way(candidates)
        right = np.array([grade.rank(table.ravel(), group["right"]) == 1 for group, table in zip(candidates.groups, candidates.split(values))], float)
        prefix = {"accuracy": "", "clip_zero_shot": "clip_", "zero_shot": "zero_shot_"}.get(name, f"{name}_")
        figures |= grade.percent(name, right) | {f"{prefix}evaluations": evaluations}
        for kind in KINDS:
            share, half = grade.percent(kind, right[kinds == kind]).values()
            figures |= {f"{prefix}{kind}": share} | ({f"{kind}_ci": half} if name == "accuracy" else {})
        rows.append([label, f"{evaluations:.0f}", *(figures[f"{prefix}{kind}"] for kind in KINDS), figures[name], figures[f"{name}_ci"]])
    figures |= {"relation_zero_shot": figures["zero_shot_relation"], "relation_over_clip": figures["relation"] - figures["clip_relation"],
                "over_clip_few_shot": figures["accuracy"] - figures["clip_few_shot"]}
    grade.print_table(rows, f"one picture, two texts that differ in one field: {len(kinds)} groups")
    tasks = ("pictures", "ten", "winoground")
    candidates = {task: Candidates(grade.read_groups(notes / f"match_{task}.jsonl")[:others], plain.painter) for task in tasks}
    rows = [["right, %", "two pictures", "ten texts, R@1", "R@5", "swapped: text", "image", "group"]]
    for name, (label, way) in known.items():
        row = [label]
        for task, these in candidates.items():
            found = grade.verdicts([group | {"kind": ""} for group in these.groups], these.split(way(these)[0]))
            shares = {f"{task}_{name}_{measure}": 100 * float(right.mean()) for (_, measure), right in found.items()}
            figures |= shares
            row += shares.values()
        rows.append(row)
    grade.print_table(rows, f"other tasks, {others} groups each, +- {98 * others**-0.5:.0f} at the most")
    return figures


def grade_groups(groups, matcher, s, title):
    """Scores groups of candidates, prints a table of kinds and measures and returns its figures."""
    import eval as grade
    candidates = Candidates(groups, matcher.painter)
    values, evaluations = scores("attention", matcher, candidates, bank(matcher.painter, s.times, s.evaluations))
    figures, rows = {}, [["kind", "measure", "right, %", "+-", "groups"]]
    for (kind, measure), right in grade.verdicts(groups, candidates.split(values)).items():
        share, half = grade.percent(measure, right).values()
        figures[f"{kind}_{measure}".strip("_")] = share
        rows.append([kind or "all", measure, share, half, len(right)])
    grade.print_table(rows, f"{title}: {len(groups)} groups, {evaluations:.0f} network evaluations each")
    return figures


def retrieve(data, count, matcher, s):
    """R@1, 5 and 10 among the captions of the first `count` validation pictures of a folder, and back."""
    import eval as grade
    items = common.CaptionedImages(data, "val", matcher.painter.side).items[:count]
    paths, captions = [str(path) for path, _, _ in items], [text for _, texts, _ in items for text in texts]
    owner = [i for i, (_, texts, _) in enumerate(items) for _ in texts]
    candidates = Candidates([{"pictures": paths, "texts": captions}], matcher.painter)
    values, evaluations = scores("attention", matcher, candidates, bank(matcher.painter, s.times, s.evaluations))
    figures = grade.recalls(candidates.split(values)[0], owner)
    rows = [["found, %", "R@1", "R@5", "R@10"], *([name, *(figures[f"{name}_R@{k}"] for k in (1, 5, 10))] for name in ("text", "picture"))]
    grade.print_table(rows, f"{data}: {len(items)} pictures, {len(owner)} captions, {evaluations:.0f} network evaluations")
    return figures


# ------------------------------------------------------------------------------------------------- where each word looked
def words(tokenizer, text, length):
    """[(word, numbers of its tokens)] of a text, as far as `length` tokens are read."""
    spans = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=length).offset_mapping
    found = []
    for word in re.finditer(r"\S+", text):
        tokens = [i for i, (a, b) in enumerate(spans) if a < b and a < word.end() and b > word.start()]
        found += [(word.group(), tokens)] if tokens else []
    return found


@torch.no_grad()
def attention_maps(matcher, x_0, text, noises):
    """How the patches share their attention among the tokens of a text: (side, side, L), mean over heads as they are weighted, and over t."""
    y, mask = matcher.read(*matcher.painter.encoder([text]))
    weight, total = (matcher.looked * matcher.weight).abs(), 0
    for t, eps in noises:
        seen, _ = matcher.look(matcher.painter.diffusion.q_sample(x_0, t[None], eps[None]), t[None], y, mask)
        # the gradient of LogSumExp is the softmax: how much each word adds to the score of a patch
        shares = torch.stack([logits.float().softmax(-1)[0] for logits, _, _ in seen])                         # (blocks, heads, N, L)
        total = total + (shares * weight[..., None, None]).sum((0, 1)) / weight.sum() / len(noises)
    side = math.isqrt(total.shape[0])
    return total.view(side, side, -1).cpu().numpy()


def draw_overlay(matcher, picture, texts, values, noises, path, side=144):
    """For each text a row: the picture with its score, then for each word where it got more than its mean share; one scale a row."""
    from PIL import Image

    import sample
    tokenizer, x_0 = matcher.painter.encoder.tokenizer, to_x_0(matcher.painter, picture[None])
    plain = np.asarray(Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST), float)
    pale, glow = 0.35 * plain + 0.65 * 255, np.array([0, 128, 140.0])         # a colour that no shape has
    rows = [words(tokenizer, text, matcher.painter.encoder.length) for text in texts]
    columns, cells, labels = 1 + max(map(len, rows)), [], []
    for text, value, row in zip(texts, values, rows):
        shares = attention_maps(matcher, x_0, text, noises)
        more = [(share - share.mean()).clip(0) for share in (shares[..., tokens].sum(-1) for _, tokens in row)]
        highest = max(share.max() for share in more)
        for share in more:
            heat = Image.fromarray((share / highest).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            alpha = 0.85 * np.asarray(heat).clip(0, 1)[..., None]
            cells.append((1 - alpha) * pale + alpha * glow)
        cells.insert(len(labels), plain.copy())
        cells += [np.full_like(plain, 255)] * (columns - 1 - len(row))
        labels += [f"score {value:.3f}", *(word for word, _ in row), *[""] * (columns - 1 - len(row))]
    for cell, label in zip(cells, labels):
        if label:                                                             # a frame: most pictures are as light as the sheet
            cell[[0, -1]] = cell[:, [0, -1]] = 205
    sample.picture_grid([cell.astype(np.uint8) for cell in cells], labels, path, columns, titles=texts)


def rank_texts(matcher, path, texts, s, out):
    """Ranks texts for a picture: prints them with their scores, and draws where each word looked."""
    import eval as grade
    noises = bank(matcher.painter, s.times, s.evaluations)
    candidates = Candidates([{"pictures": [path], "texts": texts}], matcher.painter)
    values = candidates.split(scores("attention", matcher, candidates, noises)[0])[0][0]
    order = np.argsort(-values)
    grade.print_table([["text", "score"], *([texts[i], f"{values[i]:.3f}"] for i in order)], f"{path}")
    draw_overlay(matcher, candidates.pictures[0], [texts[i] for i in order], values[order], noises, out)
    print(f"where each word looked: {out}")


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    begin = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_argument_group("what to do")
    action.add_argument("picture", nargs="?", help="a picture, to rank texts for")
    action.add_argument("texts", nargs="*", help="the texts")
    action.add_argument("--train", action="store_true", help="tune on labelled groups and, on the toy world, grade beside the rivals")
    action.add_argument("--groups", help="score the groups of candidates in a file, a JSON object a line: pictures, texts, right, kind; also after "
                        "--train")
    action.add_argument("--comvg", help="score ComVG's pairs of pictures, in its CSV file")
    action.add_argument("--retrieval", help="find captions for pictures and pictures for captions, in a folder in the layout of MS-COCO")
    parser.add_argument("--run", default="runs/dsd", help="tuned run to score with (default %(default)s)")
    parser.add_argument("--zero-shot", action="store_true", help="score with its base, not tuned")
    parser.add_argument("--pictures", default=".", help="--comvg: the folder of the pictures, <id>.jpg")
    parser.add_argument("--pool-size", type=common.positive, default=50, help="--retrieval: pictures (default %(default)s)")
    parser.add_argument("--samples", type=common.positive, default=512, help="--train: pairs of each kind to grade (default %(default)s)")
    parser.add_argument("--others", type=common.positive, default=128, help="--train: groups of each other task (default %(default)s)")
    common.add_training_flags(parser, Settings, PRESETS, "run folder of --train (default runs/dsd), or the file of the picture of attention",
                              "resume", "overwrite")
    args = parser.parse_args()
    actions = {"--train": args.train, "a picture": args.picture, "--comvg": args.comvg, "--retrieval": args.retrieval,
               "--groups": args.groups and not args.train}                    # which --train scores too
    asked = [name for name, value in actions.items() if value]
    if not asked:
        parser.print_help()
        return
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} do not go together: give a command for each")
    import eval as grade
    import sample
    import toy
    if not args.train:
        if args.picture and not args.texts:
            raise UserError("name texts to rank, each in quotes, behind the picture")
        if not (Path(args.run) / "config.json").exists():
            raise UserError(f"there is no run in {args.run}/: tune one first, python dsd.py --train")
        matcher, s = load(args.run, args.device, args.precision, args.zero_shot), common.read_settings(Settings, args.run)
        if args.picture:
            rank_texts(matcher, args.picture, args.texts, s, Path(args.out or Path(args.run) / "samples" / f"{Path(args.picture).stem}.png"))
        elif args.retrieval:
            retrieve("data/shapes" if args.retrieval == "shapes" else args.retrieval, args.pool_size, matcher, s)
        else:
            groups = grade.read_groups(args.groups) if args.groups else grade.read_comvg(args.comvg, args.pictures)
            grade_groups(groups, matcher, s, args.groups or args.comvg)
        return
    s, options = common.make_settings(Settings, PRESETS, args), common.make_settings(common.Options, None, args)
    options.save_every = 100
    folder, known = Path(args.out or "runs/dsd"), s.data == "shapes"
    common.check_run(folder, options)
    more = grade.read_groups(args.groups) if args.groups else []
    painter = sample.load_or_train(s.base, args.device, args.precision)
    begin = time.time() if known else begin                                   # without the flagship, which may have been trained first
    data = toy.prepare(s.data, painter.settings.clip, painter.side)
    if known:
        from toy import matching
        matching.build_matching(data, painter.side)
    s = dataclasses.replace(s, base_identity=painter.identity())
    groups = [group for group in grade.read_groups(Path(data) / "annotations" / "match_train.jsonl" if known else data) if "right" in group]
    groups = groups[:max(1, round(s.shots * len(groups))) if s.shots < 1 else int(s.shots)]
    if not groups:
        raise UserError(f"--data {data}: no group with a right candidate to learn from")
    matcher, candidates = Matcher(s, painter), Candidates(groups, painter)
    train(s, matcher, candidates, folder, options)
    print(f"tuned on {len(groups)} groups in {time.time() - begin:.0f} s: {sum(p.numel() for p in matcher.tuned().values()):,} parameters beside "
          f"{sum(p.numel() for p in painter.model.parameters()):,}")
    matcher.requires_grad_(False)
    if known:
        clip = grade.ClipScorer(painter.settings.clip, painter.device)
        plain = Matcher(untuned(s), painter)
        tuned_clip = grade.tune_clip(clip, candidates.pictures, candidates.texts, examples(candidates))
        figures = grade_toy(s, matcher, plain, clip, tuned_clip, data, args.samples, args.others)
        group = grade.read_groups(Path(data) / "annotations" / "match_ten.jsonl")[0]
        right, texts = group["texts"][group["right"]], [text for i, text in enumerate(group["texts"]) if i != group["right"]]
        rank_texts(matcher, group["pictures"][0], [right, *texts[:3]], s, folder / "samples" / "attention.png")
        grade.write_results(folder, figures | {"seconds": time.time() - begin, "peak_memory_mb": grade.peak_memory_mb()})
        print(f"{time.time() - begin:.0f} s beyond the flagship; figures in {folder / 'results.json'}")
    if more:
        grade.write_results(folder, grade_groups(more, matcher, s, args.groups))


if __name__ == "__main__":
    common.entry(main)
