"""Discriminative Stable Diffusion: a frozen generator as a few-shot matcher (arXiv 2305.10722).

The idea. A network that draws an image from a text has to know what the words look like. So show it
a noisy image and a text, and read the attention logits between patches and words: they
are high where a patch shows what a word names. Pooled, they are the matching score. A few labelled
examples sharpen it: they train LoRA on the blocks, the weights of the attention heads, and a few
prompt embeddings before the caption. The network stays frozen, and no classifier is put on top.

    x_t       = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps   the same few (t, eps) for all candidates
    logits    = q k^T / sqrt(d)                           of N patches and L words, in three blocks
    a         = mean over patches of log sum exp over words of logits    padding masked, float32
    b         = a - mean over patches of log sum exp over all keys       log of the words' share
    attention = mean over blocks and heads of w_0 a + w_1 b              zero-shot: w = (1, 0)
    hybrid    = attention + ||eps_theta(x_t, "") - eps|| - ||eps_theta(x_t, text) - eps||
    score     = mean over t of attention, or of hybrid: --score
    loss      = max(0, margin + max score(wrong) - score(right))         over the wrong candidates

Shapes: x (B, C, S, S); t (B,); caption tokens y (B, P + L, D), the P learned prompts first, and
their mask; logits (B, H, N, L) of each block; [a, b] (B, 2, blocks, H); w (2, blocks, H).

    python dsd.py --train              # toy world: 68 % of held-out pairs zero-shot, 94 % tuned
    python dsd.py image.png "two red circles" "two red squares"     # ranks texts, draws attention
    python -m experiments.dsd grade --groups winoground.jsonl       # ComVG, retrieval, any groups
    python -m experiments.dsd compare                               # CLIP and denoising errors

Differs from the paper [what its release does]; docs/dsd.md has the rest:
 1. A score is for one sample [the mean over a batch, which leaks which candidate is right].
 2. The right candidate can be anywhere; a tie or nan is wrong [first; ties go to the first].
 3. In training the candidates of a group share t and eps [each draws its own].
 4. Padding is masked [all 77 keys count]. Head weights also weigh b [weights are only described].
 5. Preset toy tunes and scores the attention alone [the hybrid, as preset paper does].
 6. Learned prompts stand before the caption tokens and are not pooled [described, not released].
 7. toy: LoRA is also on the feed-forward layers, or else shapes are confused [attention alone].
"""
import argparse
import copy
import dataclasses
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import image_data
import toy
import uvit_fusion
from common import UserError
from toy import matching


@dataclass
class Config:
    base: str = "runs/uvit_fusion"  # run of uvit_fusion.py or fine_rewards.py to match with
    score: Literal["attention", "hybrid"] = "attention"  # hybrid: also the error that text saves
    times: tuple = (20, 400)        # lowest and highest t
    evaluations: int = 4            # values of t, evenly spaced: network evaluations a candidate
    prompts: int = 4                # learned prompt embeddings
    head_weights: bool = True       # learn two weights for each attention head
    lora_rank: int = 4              # rank of LoRA on q, k, v and out of all attention (0: none)
    lora_mlp: bool = True           # LoRA on the feed-forward layers, too
    data: str = "shapes"            # "shapes" (the toy world), or a file of groups
    shots: float = 512              # labelled groups, the first of the file; below 1: a share
    steps: int = 400                # training steps
    batch_size: int = 16            # groups per step
    negatives: int = 3              # wrong candidates a group: its own, then other groups' texts
    margin: float = 0.3             # by which the right candidate should be ahead
    lr: float = 4e-3                # highest learning rate of AdamW
    weight_lr: float = 2e-2         # the same for the weights of the heads
    warmup: int = 50                # steps of linear warm-up
    decay: float = 1.0              # share of the steps, at the end, in which the rate falls to 0
    weight_decay: float = 0.01      # of AdamW, except for the weights of the heads
    betas: tuple = (0.9, 0.99)      # of AdamW
    grad_clip: float = 1.0          # largest norm of the gradient (0: no clipping)
    seed: int = 0                   # of weights, order and noise
    # no flags: a hash of the base, set when the training begins, and the method
    base_identity: str = ""
    method: str = "dsd"

    def __post_init__(self):
        low, high = self.times
        if not 1 <= low <= high <= uvit_fusion.Diffusion.T:
            raise UserError(f"--times {low} {high}: expected 1 <= lowest <= highest <= 1000")
        common.check_bounds(
            self, evaluations=(1, uvit_fusion.Diffusion.T), prompts=(0, 1000), lora_rank=(0, 10**6),
            shots=(0, 1e9), negatives=(1, 1000), weight_lr=common.BOUNDS["lr"])


PRESETS = {
    "toy": {},
    # the release, for RefCOCOg; steps and batch size are the toy's
    "paper": dict(
        base="runs/coco256", score="hybrid", times=(10, 990), evaluations=10, prompts=0,
        head_weights=False, lora_mlp=False, data="refcocog_train.jsonl", shots=0.05, negatives=9,
        margin=0.1, lr=1e-4, warmup=0, decay=0.0, betas=(0.9, 0.999)),
}
# --quick: a smaller run
QUICK = dict(out="runs/quick_dsd", samples=64, steps=100, warmup=15)


# --------------------------------------------------------------------------------------- the score
def noise_bank(pipeline, times, count):
    """What all candidates share: `count` evenly spaced t with their noise, [(t, eps (C, S, S))]."""
    cfg = pipeline.cfg
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.linspace(*times, count)
    if count == 1:
        timesteps = torch.tensor([sum(times) / 2])      # linspace would give the lowest
    order = torch.randperm(count, generator=generator)  # shuffled for the pruning in experiments/
    bank = []
    for t in timesteps.round().long()[order]:
        eps = torch.randn(cfg.channels, cfg.size, cfg.size, generator=generator)
        bank.append((t.to(pipeline.device), eps.to(pipeline.device)))
    return bank


def pool_words(words, keys):
    """a and b of logits to words (B, H, N, L) and to all keys (B, H, N, K): (B, 2, H)."""
    a = words.logsumexp(-1)                                                           # (B, H, N)
    b = a - keys.logsumexp(-1)           # log of the words' share of the softmax over all keys
    return torch.stack([a, b], dim=1).mean(-1)


class Matcher(nn.Module):
    """A frozen copy of a pipeline's U-ViT, with what is tuned: LoRA, prompts and head weights w."""
    def __init__(self, cfg, pipeline):
        super().__init__()
        self.cfg = cfg
        self.pipeline = pipeline
        self.bank = noise_bank(pipeline, cfg.times, cfg.evaluations)
        self.uvit = copy.deepcopy(pipeline.model).requires_grad_(False)
        joint = self.uvit.joint_blocks
        # the last on the way down, the middle, the last on the way up; duplicates count once
        self.blocks = sorted({max(0, joint // 2 - 1), joint // 2, joint - 1})
        torch.manual_seed(cfg.seed)
        if cfg.lora_rank:
            names = ("qkv", "proj", "fc1", "fc2") if cfg.lora_mlp else ("qkv", "proj")
            common.add_lora(self.uvit, cfg.lora_rank, names)
        # 0.5: a tenth as large as the caption tokens of the toy world
        prompts = 0.5 * torch.randn(cfg.prompts, pipeline.cfg.dim)                    # (P, D)
        w = torch.zeros(2, len(self.blocks), pipeline.cfg.heads)                   # (2, blocks, H)
        w[0] = 1                                                # zero-shot: a alone, as published
        self.prompts = nn.Parameter(prompts, requires_grad=cfg.prompts > 0)
        self.w = nn.Parameter(w, requires_grad=cfg.head_weights)
        self.to(pipeline.device)

    def tuned(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode_text(self, texts):
        """B texts -> caption tokens y (B, P + L, D), the learned prompts first, and their mask."""
        features, mask = self.pipeline.text_encoder(texts)
        with common.autocast(self.pipeline.device, self.pipeline.precision):
            y = self.uvit.encode_text(features, mask)
        prompts = self.prompts.to(y.dtype).expand(len(y), -1, -1)
        return torch.cat([prompts, y], dim=1), F.pad(mask, (len(self.prompts), 0), value=True)

    def attention_logits(self, x_t, t, y, mask):
        """Logits of three joint blocks to words (-inf on padding) and to all keys; the output.

        [(B, H, N, L)], [(B, H, N, K)], (B, C, S, S).
        """
        with common.autocast(self.pipeline.device, self.pipeline.precision):
            output, logits = self.uvit.denoise(x_t, t, y, mask, return_logits=True)
        patches = (x_t.shape[-1] // self.uvit.patch)**2
        # Queries: the patches come last. Keys: [time, prompts, words, patches], or with
        # cross-attention [time, patches, prompts, words]. The prompts are not pooled.
        first_word = 1 + len(self.prompts) + (patches if self.uvit.cross else 0)
        word_mask = mask[:, len(self.prompts):]                                       # (B, L)
        words = slice(first_word, first_word + word_mask.shape[1])
        padding = ~word_mask[:, None, None]                                           # (B, 1, 1, L)
        to_keys = [logits[block][:, :, -patches:] for block in self.blocks]
        to_words = [block[..., words].masked_fill(padding, -math.inf) for block in to_keys]
        return to_words, to_keys, output.float()

    def predict_eps_without_text(self, x_t, t):
        """eps_theta(x_t, "") of each candidate, (B, C, S, S); equal x_t are evaluated once."""
        x_t, candidate = x_t.unique(dim=0, return_inverse=True)
        t = t.new_zeros(len(x_t)).scatter(0, candidate, t)      # one t for each distinct x_t
        y, mask = self.encode_text([""])
        y = y.expand(len(x_t), -1, -1)
        _, _, output = self.attention_logits(x_t, t, y, mask.expand(len(x_t), -1))
        _, eps_empty = self.pipeline.diffusion.predict(output, x_t, t)
        return eps_empty[candidate]

    def attention(self, to_words, to_keys):
        """The attention score, (B,)."""
        pooled = torch.stack(list(map(pool_words, to_words, to_keys)), dim=2)    # (B, 2, blocks, H)
        return (self.w * pooled).sum(1).mean((1, 2))

    def forward(self, x_0, t, eps, y, mask):
        """The score of each pair at its t and eps, (B,)."""
        diffusion = self.pipeline.diffusion
        x_t = diffusion.q_sample(x_0, t, eps)
        to_words, to_keys, output = self.attention_logits(x_t, t, y, mask)
        score = self.attention(to_words, to_keys)
        if self.cfg.score == "hybrid":
            _, eps_theta = diffusion.predict(output, x_t, t)    # as eps, whatever its target
            eps_empty = self.predict_eps_without_text(x_t, t)
            # L2 norms, of the whole error of a pair
            without_text = torch.linalg.vector_norm(eps_empty - eps, dim=(1, 2, 3))       # (B,)
            with_text = torch.linalg.vector_norm(eps_theta - eps, dim=(1, 2, 3))          # (B,)
            score = score + without_text - with_text
        return score


class Candidates:
    """All images, texts and (image, text) pairs of groups (see `read_groups`), each once.

    images uint8 (I, 3, H, W); x_0 (I, C, S, S); texts; pairs (M, 2), numbers of an image and a
    text; members: for each group the numbers of its pairs.
    """
    def __init__(self, groups, pipeline):
        # a new path, text or pair gets the next number
        image_number = {}
        text_number = {}
        pair_number = {}
        self.groups = groups
        self.members = []
        for group in groups:
            numbers = []
            for path in group["pictures"]:
                image = image_number.setdefault(path, len(image_number))
                for text in group["texts"]:
                    pair = (image, text_number.setdefault(text, len(text_number)))
                    numbers.append(pair_number.setdefault(pair, len(pair_number)))
            self.members.append(torch.tensor(numbers))
        self.pairs = torch.tensor(list(pair_number))
        self.texts = list(text_number)
        images = [image_data.load_image(path, pipeline.image_size) for path in image_number]
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        self.x_0 = pipeline.encode(self.images, sample=False)

    def tables(self, scores):
        """Scores (M,) of all pairs -> for each group an array (images, texts)."""
        return [scores[members].view(len(group["pictures"]), -1).numpy()
                for group, members in zip(self.groups, self.members)]


@torch.no_grad()
def match(matcher, candidates, bank=None, score=Matcher.forward, batch_size=256):
    """The score of every pair, (M,): its mean over a noise bank (default: the matcher's).

    score(matcher, x_0, t, eps, y, mask) -> (B,): of a batch of pairs, like `Matcher.forward`.
    """
    bank = bank or matcher.bank
    scores = []
    for pairs in tqdm(candidates.pairs.split(batch_size), "matching", leave=False):
        x_0 = candidates.x_0[pairs[:, 0]]
        y, mask = matcher.encode_text([candidates.texts[i] for i in pairs[:, 1].tolist()])
        scores_at_t = [score(matcher, x_0, t.expand(len(x_0)), eps.expand_as(x_0), y, mask)
                       for t, eps in bank]
        scores.append(torch.stack(scores_at_t).mean(0).cpu())
    scores = torch.cat(scores)
    if not scores.isfinite().all():                             # nan would count as wrong
        raise UserError("the network gives nan, not scores: its weights are damaged, or too large "
                        "for this precision: try --precision fp32")
    return scores


def match_and_count(matcher, candidates, bank=None):
    """`match` with the matcher's own score, and how many network evaluations that takes."""
    bank = bank or matcher.bank
    evaluations = len(candidates.pairs) * len(bank)
    if matcher.cfg.score == "hybrid":
        evaluations += len(candidates.x_0) * len(bank)          # without a text: once per image
    return match(matcher, candidates, bank), evaluations


# ---------------------------------------------------------------------------------------- the loss
def hinge_loss(right, wrong, margin):
    """max(0, margin + max wrong - right), the mean over groups; right (B,), wrong (B, n)."""
    return F.relu(margin + wrong.amax(1) - right).mean()


def count_words(texts):
    """Which words each text has: 0 and 1, (texts, words)."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    vocabulary = {word: number for number, word in enumerate(sorted(set().union(*words)))}
    has_word = torch.zeros(len(texts), len(vocabulary))
    for row, own in zip(has_word, words):
        row[[vocabulary[word] for word in own]] = 1
    return has_word


def most_similar_texts(has_word, i, count):
    """The numbers of the texts most similar to text i: words in common / all words of the two."""
    common_words = has_word @ has_word[i]                                             # (texts,)
    lengths = has_word.sum(1)
    similarity = common_words / (lengths + lengths[i] - common_words).clamp(min=1)
    order = similarity.argsort(descending=True, stable=True).tolist()
    return [j for j in order if j != i][:count]


def hard_negatives(candidates, needed):
    """For each group (right pair, its wrong pairs, further wrong pairs); a pair is [image, text].

    A group with fewer than `needed` wrong pairs gets further ones: its image with similar texts
    from other groups. (A few of these texts may happen to fit.)
    """
    has_word = None
    if min(map(len, candidates.members)) <= needed:         # most benchmarks have enough negatives
        has_word = count_words(candidates.texts)
    examples = []
    for group, members in zip(candidates.groups, candidates.members):
        wrong = candidates.pairs[members].tolist()
        own_texts = {text for _, text in wrong}
        right = wrong.pop(group["right"])                              # which leaves the wrong ones
        further = []
        if len(wrong) < needed:
            # some to choose from, and as many as are needed besides its own
            count = max(40, needed + len(own_texts))
            similar = most_similar_texts(has_word, right[1], count)
            further = [[right[0], text] for text in similar if text not in own_texts]
        examples.append((right, wrong, further))
    return examples


# ------------------------------------------------------------------------------------ the training
def draw_pairs(examples, cfg, rng):
    """The pairs of a batch of groups, (B, 1 + negatives, 2), the right one of each first."""
    batch = []
    for right, wrong, further in rng.sample(examples, min(cfg.batch_size, len(examples))):
        negatives = rng.sample(wrong, len(wrong)) + rng.sample(further, len(further))
        batch.append([right, *negatives[:cfg.negatives]])
    return torch.tensor(batch)


def make_optimizer(matcher, cfg):
    """AdamW; the weights of the heads have their own learning rate and do not decay."""
    tuned = matcher.tuned()
    w = [tuned.pop("w")] if cfg.head_weights else []
    return torch.optim.AdamW(
        [{"params": list(tuned.values()), "initial_lr": cfg.lr, "weight_decay": cfg.weight_decay},
         {"params": w, "initial_lr": cfg.weight_lr, "weight_decay": 0.0}], betas=cfg.betas)


def train(cfg, matcher, candidates, folder, args):
    """Tunes a matcher on labelled groups and fills the run folder."""
    device = matcher.pipeline.device
    examples = hard_negatives(candidates, cfg.negatives)
    fewest = min(len(wrong + further) for _, wrong, further in examples)
    if fewest < cfg.negatives:
        raise UserError(f"--negatives {cfg.negatives}: a group has only {fewest} wrong candidates")
    tuned = matcher.tuned()
    if not tuned:
        raise UserError("there is nothing to tune: choose --prompts, --head-weights or --lora-rank")
    optimizer = make_optimizer(matcher, cfg)
    parts = [nn.ParameterList(tuned.values()), optimizer]              # not the frozen network
    run = common.Run(folder, cfg, parts, tuned, args, matcher.pipeline.precision, save_every=100,
                     title="tuning")

    for step in range(run.start + 1, cfg.steps + 1):
        # step n depends on n alone: a resumed run equals an uninterrupted one
        torch.manual_seed(cfg.seed * 10**9 + step)
        pairs = draw_pairs(examples, cfg, random.Random(cfg.seed * 10**9 + step))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * uvit_fusion.learning_rate(cfg, step)
        batch_size, n, _ = pairs.shape                                 # n candidates a group
        image, text = pairs.view(-1, 2).T                              # (B n,)
        x_0 = candidates.x_0[image]                                    # (B n, C, S, S)
        # one t and one eps for all candidates of a group: they are compared at the same noise
        t = torch.randint(cfg.times[0], cfg.times[1] + 1, (batch_size,), device=device)
        eps = torch.randn(batch_size, *x_0.shape[1:], device=device)
        t = t.repeat_interleave(n)                                     # (B n,)
        eps = eps.repeat_interleave(n, dim=0)                          # (B n, C, S, S)
        y, mask = matcher.encode_text([candidates.texts[i] for i in text.tolist()])
        score = matcher(x_0, t, eps, y, mask).view(batch_size, n)
        right, wrong = score[:, 0], score[:, 1:]
        loss = hinge_loss(right, wrong, cfg.margin)
        optimizer.zero_grad()
        loss.backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(tuned.values(), cfg.grad_clip)
        optimizer.step()
        run.log(step, loss=loss, right=(right > wrong.amax(1)).float().mean())
        if run.due(step):
            run.save(step)
    matcher.requires_grad_(False)


# ----------------------------------------------------------------------------------- a run, loaded
def zero_shot(cfg, pipeline):
    """The matcher that has nothing to tune."""
    cfg = dataclasses.replace(cfg, prompts=0, head_weights=False, lora_rank=0)
    return Matcher(cfg, pipeline).requires_grad_(False)


def load_base(path, args):
    device = common.pick_device(args.device)
    return uvit_fusion.load_pipeline(path, device, common.pick_precision(args.precision, device))


def load_matcher(path, args):
    """The tuned matcher of a run; for a run of uvit_fusion.py or fine_rewards.py, zero-shot."""
    folder, weights = common.run_files(path)
    if not (folder / "config.json").exists():
        raise UserError(f"there is no run in {folder}/: tune one first (python dsd.py --train), or "
                        "match zero-shot (--run runs/uvit_fusion)")
    method = common.read_json(folder / "config.json").get("method")
    if method in ("uvit_fusion", "fine_rewards"):
        return zero_shot(Config(), load_base(path, args))
    if method != "dsd":
        raise UserError(f"{folder}/ is a run of {method}: name one of dsd.py, or one of "
                        "uvit_fusion.py or fine_rewards.py to match zero-shot")
    cfg = common.read_config(Config, folder)
    pipeline = load_base(cfg.base, args)
    if cfg.base_identity != pipeline.identity():
        raise UserError(f"{folder}/ was tuned for another network or text encoder; {cfg.base} has "
                        "changed: tune it again with --train")
    matcher = Matcher(cfg, pipeline)
    tensors = common.read_weights(weights, f"checkpoint {weights}")
    common.load_into(matcher, matcher.state_dict() | tensors, weights)      # the rest is the base's
    return matcher.requires_grad_(False)


# -------------------------------------------------------------------------------- the toy world
def toy_groups(pipeline):
    """The folder of the toy world's groups, match_*.jsonl, which are built when first needed."""
    data = toy.prepare("shapes", pipeline.cfg.clip, pipeline.image_size)
    return Path(matching.build_matching(data, pipeline.image_size)) / "annotations"


def labelled_groups(cfg, pipeline):
    """The first labelled groups of cfg.data; cfg.shots: their number or, below 1, their share."""
    path = toy_groups(pipeline) / "match_tune.jsonl" if cfg.data == "shapes" else cfg.data
    groups = [group for group in matching.read_groups(path) if "right" in group]
    if not groups:
        raise UserError(f"--data {path}: no group with a right candidate to learn from")
    return groups[:max(1, round(cfg.shots * len(groups) if cfg.shots < 1 else cfg.shots))]


def toy_candidates(pipeline, samples):
    """Held-out groups of two texts, `samples` of each kind, and those of two images."""
    annotations = toy_groups(pipeline)
    pairs = matching.read_groups(annotations / "match_val.jsonl")[:len(matching.KINDS) * samples]
    pictures = matching.read_groups(annotations / "match_pictures.jsonl")
    return Candidates(pairs, pipeline), Candidates(pictures, pipeline)


def grade_toy(matcher, samples):
    """Zero-shot and tuned, on held-out groups of the toy world: prints a table, returns figures."""
    cfg = matcher.cfg
    pairs, pictures = toy_candidates(matcher.pipeline, samples)
    scores = {}
    picture_scores = {}
    for name, each in (("zero_shot", zero_shot(cfg, matcher.pipeline)), ("accuracy", matcher)):
        scores[name] = match_and_count(each, pairs)
        picture_scores[name] = match_and_count(each, pictures)
    labels = {"zero_shot": f"{cfg.score}, zero-shot", "accuracy": f"{cfg.score}, tuned"}
    return matching.grade_pairs(pairs, scores, pictures, picture_scores, labels)


# -------------------------------------------------------------------------------- where words look
def find_words(tokenizer, text, length):
    """[(word, numbers of its tokens), ...] of a text, which is cut after `length` tokens."""
    encoding = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    found = []
    for word in re.finditer(r"\S+", text):
        tokens = [i for i, (start, end) in enumerate(encoding.offset_mapping)
                  if max(start, word.start()) < min(end, word.end())]          # they overlap
        if tokens:
            found.append((word.group(), tokens))
    return found or [(text, [])]                     # a text without any token, such as U+200B


@torch.no_grad()
def attention_maps(matcher, x_0, text):
    """How each patch divides its attention among the tokens of a text: shares (side, side, L)."""
    y, mask = matcher.encode_text([text])
    w = matcher.w.abs().sum(0) / matcher.w.abs().sum()                                # (blocks, H)
    maps = 0
    for t, eps in matcher.bank:
        x_t = matcher.pipeline.diffusion.q_sample(x_0, t[None], eps[None])
        to_words, _, _ = matcher.attention_logits(x_t, t[None], y, mask)
        # the gradient of LogSumExp is the softmax: what each token adds to the score of a patch
        shares = torch.cat(to_words).softmax(-1)                                # (blocks, H, N, L)
        maps = maps + (w[..., None, None] * shares).sum((0, 1)) / len(matcher.bank)
    side = math.isqrt(len(maps))
    return maps.view(side, side, -1).cpu().numpy()


def draw_attention(matcher, image, texts, scores, path):
    """A row for each text: the image (3, H, H), then for each word the patches that look at it."""
    encoder = matcher.pipeline.text_encoder
    x_0 = matcher.pipeline.encode(image[None], sample=False)
    image = image.permute(1, 2, 0).numpy().astype(float)
    pale = 255 - 0.35 * (255 - image)
    teal = np.array([0, 128, 140])                                    # a colour that no shape has
    words = [find_words(encoder.tokenizer, text, encoder.length) for text in texts]
    columns = 1 + max(map(len, words))
    cells = []
    labels = []
    for text, score, row in zip(texts, scores, words):
        maps = attention_maps(matcher, x_0, text)                     # (side, side, L)
        shares = np.stack([maps[..., tokens].sum(-1) for _, tokens in row])
        heat = (shares - shares.mean((1, 2), keepdims=True)).clip(0)
        heat = 0.85 * heat / max(heat.max(), 1e-6)                    # one scale a row
        pixels = len(image) // len(maps)                              # of a side of a patch
        heat = heat.repeat(pixels, axis=1).repeat(pixels, axis=2)     # (words, H, H)
        missing = columns - 1 - len(row)                              # words of a shorter text
        cells += [image, *(h * teal + (1 - h) * pale for h in heat[..., None])]
        cells += missing * [np.full_like(image, 255)]
        labels += [f"score {score:.3f}", *(word for word, _ in row), *missing * [""]]
    common.image_grid([np.uint8(cell) for cell in cells], labels, path, columns, titles=texts)


def rank_texts(matcher, path, texts, out):
    """Ranks texts for an image: prints their scores, and draws where each word looks."""
    candidates = Candidates([{"pictures": [path], "texts": texts}], matcher.pipeline)
    scores = candidates.tables(match(matcher, candidates))[0][0]                # of the one image
    order = np.argsort(-scores)
    texts = [texts[i] for i in order]
    scores = scores[order]
    rows = [[text, f"{score:.3f}"] for text, score in zip(texts, scores)]
    common.print_table([["text", "score"], *rows], path)
    draw_attention(matcher, candidates.images[0], texts, scores, out)
    print(f"where each word looks: {out}")


# -------------------------------------------------------------------------------------------- main
def train_and_grade(parser, args):
    cfg = common.make_config(Config, PRESETS, args)
    if cfg.data != "shapes":
        common.refuse_flags(parser, args, ["samples"], "only the toy world is graded")
    folder = Path(args.out or "runs/dsd")
    common.check_run(folder, args)
    pipeline = load_base(cfg.base, args)
    cfg = dataclasses.replace(cfg, base_identity=pipeline.identity())
    groups = labelled_groups(cfg, pipeline)
    begin = time.time()
    matcher = Matcher(cfg, pipeline)
    count = sum(p.numel() for p in matcher.tuned().values())
    train(cfg, matcher, Candidates(groups, pipeline), folder, args)
    print(f"tuned {count:,} parameters on {len(groups)} groups in {time.time() - begin:.0f} s")
    figures = {}
    if cfg.data == "shapes":
        figures = grade_toy(matcher, args.samples)
        group = matching.read_groups(toy_groups(pipeline) / "match_ten.jsonl")[0]
        right = group["texts"].pop(group["right"])
        texts = [right, *group["texts"][:3]]
        rank_texts(matcher, group["pictures"][0], texts, folder / "samples" / "attention.png")
    common.finish(folder, figures, begin)


def rank_for_picture(parser, args):
    """What a matcher is for: ranks texts for an image."""
    if not args.texts or not all(text.strip() for text in args.texts):
        raise UserError("after the picture, give texts to rank, in quotes, none of them empty")
    of_training = {field.name for field in dataclasses.fields(Config)}
    of_training |= {"resume", "overwrite", "quick", "samples", "preset"}
    common.refuse_flags(parser, args, of_training, "it needs --train")
    folder, _ = common.run_files(args.run)
    out = args.out or folder / "samples" / f"{Path(args.picture).stem}.png"
    rank_texts(load_matcher(args.run, args), args.picture, args.texts, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", help="an image to rank texts for")
    parser.add_argument("texts", nargs="*", help="the texts")
    parser.add_argument("--train", action="store_true", help="tune on labelled groups and grade")
    parser.add_argument("--run", default="runs/dsd", help="tuned run that ranks; or one of "
                        "uvit_fusion.py or fine_rewards.py, zero-shot (default %(default)s)")
    parser.add_argument("--samples", type=common.positive, default=512,
                        help="--train: held-out pairs of each kind (default %(default)s)")
    common.add_training_flags(parser, "run folder of --train (default runs/dsd), or the file for "
                              "a picture's attention", QUICK)
    common.add_config_flags(parser, Config, PRESETS)
    args = common.parse_args(parser, QUICK)
    if args.train:
        if args.picture:
            raise UserError("--train or a picture: choose one")
        common.refuse_flags(parser, args, ["run"], "--train writes a new run, see --out")
        train_and_grade(parser, args)
    elif args.picture:
        rank_for_picture(parser, args)
    else:
        parser.print_help()


if __name__ == "__main__":
    common.entry(main)
