"""Discriminative Stable Diffusion: a frozen generator as a few-shot matcher (arXiv 2305.10722).

The idea. A network that draws an image from a text has to know what the words look like. So show it
an image with some noise and a text, and read the attention logits between patches and words: they
are high where a patch shows what a word names. Pooled, they are the matching score. A few labelled
examples sharpen it: they train LoRA on the attention, a weight for each attention head, and a few
prompt embeddings beside the caption. The network stays frozen, and no classifier is put on top.

    x_t    = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps      the same few (t, eps) for all candidates
    logits = q k^T / sqrt(d)                              of N patches and L words, in joint blocks
    a      = mean over patches of log sum exp over words of logits       padding masked, float32
    score  = mean over t of mean over blocks and heads of w a            zero-shot: w = 1
    loss   = max(0, margin + max score(wrong) - score(right))       max over the wrong candidates

Shapes: x (B, C, S, S); t (B,); caption tokens y (B, P + L, D), the P learned prompts first, and
their mask; logits (B, H, N, L) of each block; a (B, blocks, H); w (blocks, H); score (B,).

    python dsd.py --train              # 2 min on two CPU cores: 92 % of held-out pairs
    python dsd.py image.png "two red circles" "two red squares"     # ranks texts, draws attention
    python dsd.py --groups winoground.jsonl                         # any groups of candidates
    python dsd.py --comvg comvg.csv --pictures path/to/images
    python dsd.py --retrieval path/to/coco --pool-size 100          # R@1, 5, 10, both ways
    python -m experiments.dsd compare                               # CLIP and denoising errors

Differs from the paper [what its release does]; docs/dsd.md has the rest:
 1. A score is of one sample [the mean over a batch, which leaks which candidate is right].
 2. The right candidate stands anywhere; a tie or nan is wrong [first; ties go to the first].
 3. In training the candidates of a group share t and eps [each draws its own].
 4. Padding is masked [all 77 keys count]. All joint blocks count [three cross-attentions].
 5. The score is the attention alone [an error of the noise is added: see experiments/dsd.py].
 6. Learned prompts stand before the caption tokens and are not pooled [described, not released].
"""
import argparse
import copy
import csv
import dataclasses
import math
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import common
import toy
import uvit_fusion
from common import UserError
from toy.matching import KINDS, build_matching


@dataclass
class Config:
    base: str = "runs/uvit_fusion"  # run of uvit_fusion.py or fine_rewards.py that is to match
    times: tuple = (20, 400)        # lowest and highest t
    evaluations: int = 4            # values of t, evenly spaced: network evaluations a candidate
    prompts: int = 4                # learned prompt embeddings
    head_weights: bool = True       # learn a weight for each attention head
    lora_rank: int = 4              # rank of the change of q, k, v and out (0: none)
    data: str = "shapes"            # "shapes" (the toy world), or a file of groups, as --groups
    shots: float = 256              # labelled groups, the first of the file; below 1: a share
    steps: int = 400                # training steps
    batch_size: int = 16            # groups a step
    negatives: int = 3              # wrong candidates a group: its own, then other groups' texts
    margin: float = 0.3             # by which the right candidate shall be ahead
    lr: float = 4e-3                # highest learning rate of AdamW
    weight_lr: float = 2e-2         # the same for the weights of the heads
    warmup: int = 50                # steps of linear warm-up
    decay: float = 1.0              # share of the steps, at the end, in which the rate falls to 0
    weight_decay: float = 0.01      # of AdamW, but for the weights of the heads
    betas: tuple = (0.9, 0.99)      # of AdamW
    grad_clip: float = 1.0          # largest norm of the gradient (0: no clipping)
    seed: int = 0                   # of weights, order and noise
    # no flags: a hash of the base, set when the training begins, and the method
    base_identity: str = ""
    method: str = "dsd"

    def __post_init__(self):
        low, high = self.times
        if not 1 <= low <= high <= uvit_fusion.Diffusion.T:
            raise UserError(f"--times {low} {high}: choose 1 <= lowest <= highest <= 1000")


PRESETS = {
    "toy": {},
    # the release, for RefCOCOg
    "paper": dict(
        base="runs/coco256", times=(10, 990), evaluations=10, prompts=0, head_weights=False,
        data="refcocog_train.jsonl", shots=0.05, negatives=9,
        lr=1e-4, warmup=0, decay=0.0, betas=(0.9, 0.999)),
}


# --------------------------------------------------------------------------------------- the score
def noise_bank(pipeline, times, count, seed=0):
    """What all candidates share: `count` evenly spaced t with their noise, [(t, eps (C, S, S))]."""
    cfg = pipeline.cfg
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.linspace(*times, count)
    if count == 1:
        timesteps = torch.tensor([sum(times) / 2])
    order = torch.randperm(count, generator=generator)  # shuffled for the pruning in experiments/
    bank = []
    for t in timesteps.round().long()[order]:
        eps = torch.randn(cfg.channels, cfg.size, cfg.size, generator=generator)
        bank.append((t.to(pipeline.device), eps.to(pipeline.device)))
    return bank


def pool_words(logits):
    """a = mean over patches of log sum exp over words of logits: (B, H, N, L) -> (B, H)."""
    return logits.logsumexp(-1).mean(-1)


class Matcher(nn.Module):
    """A frozen copy of a pipeline's U-ViT, with what is tuned: LoRA, prompts and head weights w."""
    def __init__(self, cfg, pipeline):
        super().__init__()
        self.cfg = cfg
        self.pipeline = pipeline
        self.bank = noise_bank(pipeline, cfg.times, cfg.evaluations)
        self.unet = copy.deepcopy(pipeline.model).requires_grad_(False)
        torch.manual_seed(cfg.seed)
        if cfg.lora_rank:
            common.add_lora(self.unet, cfg.lora_rank)
        prompts = 0.5 * torch.randn(cfg.prompts, pipeline.cfg.dim)                    # (P, D)
        w = torch.ones(self.unet.joint_blocks, pipeline.cfg.heads)                    # (blocks, H)
        self.prompts = nn.Parameter(prompts, requires_grad=cfg.prompts > 0)
        self.w = nn.Parameter(w, requires_grad=cfg.head_weights)
        self.to(pipeline.device)

    def tuned(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode_text(self, texts):
        """B texts -> caption tokens y (B, P + L, D), the learned prompts first, and their mask."""
        features, mask = self.pipeline.text_encoder(texts)
        with common.autocast(self.pipeline.device, self.pipeline.precision):
            y = self.unet.encode_text(features, mask)
        prompts = self.prompts.to(y.dtype).expand(len(y), -1, -1)
        return torch.cat([prompts, y], dim=1), F.pad(mask, (len(self.prompts), 0), value=True)

    def attention_logits(self, x_t, t, y, mask):
        """Logits (B, H, N, L) of each joint block, -inf on padding; the network's output."""
        with common.autocast(self.pipeline.device, self.pipeline.precision):
            output, logits = self.unet.denoise(x_t, t, y, mask, return_logits=True)
        patches = (x_t.shape[-1] // self.unet.patch)**2
        # Queries: the patches come last. Keys: [time, prompts, words, patches], or with
        # cross-attention [time, patches, prompts, words]. The prompts are not pooled.
        first_word = 1 + len(self.prompts) + (patches if self.unet.cross else 0)
        word_mask = mask[:, len(self.prompts):]                                       # (B, L)
        words = slice(first_word, first_word + word_mask.shape[1])
        padding = ~word_mask[:, None, None]                                           # (B, 1, 1, L)
        logits = [block[:, :, -patches:, words].masked_fill(padding, -math.inf) for block in logits]
        return logits, output.float()

    def forward(self, x_t, t, y, mask):
        """The score of each pair at its t, (B,), and the network's output (B, C, S, S)."""
        logits, output = self.attention_logits(x_t, t, y, mask)
        a = torch.stack([pool_words(block) for block in logits], dim=1)             # (B, blocks, H)
        return (self.w * a).mean((1, 2)), output


def load_images(paths, size):
    """uint8 (N, 3, size, size). Raises UserError for an image that cannot be read."""
    images = [common.load_image(path, size) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class Candidates:
    """All images, texts and (image, text) pairs of groups (see `read_groups`), each only once.

    images uint8 (I, 3, H, W); x_0 (I, C, S, S); texts; pairs (M, 2), numbers of an image and a
    text; members: for each group the numbers of its pairs.
    """
    def __init__(self, groups, pipeline):
        image_number = {}
        text_number = {}
        pair_number = {}
        self.groups = groups
        self.members = []
        for group in groups:
            numbers = []
            for path in group["pictures"]:
                image = image_number.setdefault(path, len(image_number))  # new: the next number
                for text in group["texts"]:
                    pair = (image, text_number.setdefault(text, len(text_number)))
                    numbers.append(pair_number.setdefault(pair, len(pair_number)))
            self.members.append(torch.tensor(numbers))
        self.pairs = torch.tensor(list(pair_number))
        self.texts = list(text_number)
        self.images = load_images(list(image_number), pipeline.image_size)
        self.x_0 = pipeline.encode(self.images, sample=False)

    def tables(self, scores):
        """Scores (M,) of all pairs -> for each group an array, a row an image, a column a text."""
        return [scores[members].view(len(group["pictures"]), -1).numpy()
                for group, members in zip(self.groups, self.members)]


@torch.no_grad()
def evaluate(matcher, x_0, y, mask, t, eps):
    """One network evaluation a pair: its score (B,) and eps_theta - eps (B, C, S, S)."""
    diffusion = matcher.pipeline.diffusion
    t = t.expand(len(x_0))
    x_t = diffusion.q_sample(x_0, t, eps.expand_as(x_0))
    score, output = matcher(x_t, t, y, mask)
    _, eps_theta = diffusion.predict(output, x_t, t)   # even if the network predicts x_0 or v
    return score, eps_theta - eps


@torch.no_grad()
def attention_scores(matcher, candidates, bank=None, batch_size=256):
    """The score of every pair, (M,): its mean over a noise bank (default: the matcher's)."""
    bank = bank or matcher.bank
    scores = []
    for pairs in tqdm(candidates.pairs.split(batch_size), "matching", leave=False):
        x_0 = candidates.x_0[pairs[:, 0]]
        y, mask = matcher.encode_text([candidates.texts[i] for i in pairs[:, 1].tolist()])
        scores_at_t = [evaluate(matcher, x_0, y, mask, t, eps)[0] for t, eps in bank]
        scores.append(torch.stack(scores_at_t).mean(0).cpu())
    return torch.cat(scores)


# ---------------------------------------------------------------------------------------- the loss
def hinge_loss(right, wrong, margin):
    """max(0, margin + max wrong - right), the mean over groups; right (B,), wrong (B, n)."""
    return F.relu(margin + wrong.amax(1) - right).mean()


def most_similar_texts(words, i, count=40):
    """The numbers of the texts most similar to text i; words: the set of words of each text."""
    def jaccard(j):
        return len(words[i] & words[j]) / max(1, len(words[i] | words[j]))
    others = [j for j in range(len(words)) if j != i]
    return sorted(others, key=jaccard, reverse=True)[:count]


def hard_negatives(candidates, needed):
    """For each group (right pair, its wrong pairs, further wrong pairs); a pair is [image, text].

    A group with fewer than `needed` wrong pairs gets further ones: its image with similar texts of
    other groups. (A few of these texts may happen to fit.)
    """
    words = [set(re.findall(r"\w+", text.lower())) for text in candidates.texts]
    examples = []
    for group, members in zip(candidates.groups, candidates.members):
        wrong = candidates.pairs[members].tolist()
        own_texts = {text for _, text in wrong}
        right = wrong.pop(group["right"])                              # which leaves the wrong ones
        further = []
        if len(wrong) < needed:
            similar = most_similar_texts(words, right[1])
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
    w = [p for name, p in tuned.items() if name == "w"]
    rest = [p for name, p in tuned.items() if name != "w"]
    return torch.optim.AdamW(
        [{"params": rest, "initial_lr": cfg.lr, "weight_decay": cfg.weight_decay},
         {"params": w, "initial_lr": cfg.weight_lr, "weight_decay": 0.0}], betas=cfg.betas)


def train(cfg, matcher, candidates, folder, args):
    """Tunes a matcher on labelled groups and fills the run folder."""
    pipeline = matcher.pipeline
    examples = hard_negatives(candidates, cfg.negatives)
    fewest = min(len(wrong + further) for _, wrong, further in examples)
    if fewest < cfg.negatives:
        raise UserError(f"--negatives {cfg.negatives}: a group has only {fewest} wrong candidates")
    tuned = matcher.tuned()
    if not tuned:
        raise UserError("nothing is to be tuned: choose --prompts, --head-weights or --lora-rank")
    optimizer = make_optimizer(matcher, cfg)
    parts = [nn.ParameterList(tuned.values()), optimizer]              # not the frozen network
    run = common.Run(folder, cfg, parts, tuned, args, pipeline.precision, save_every=100,
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
        t = torch.randint(cfg.times[0], cfg.times[1] + 1, (batch_size,), device=pipeline.device)
        eps = torch.randn(batch_size, *x_0.shape[1:], device=pipeline.device)
        t = t.repeat_interleave(n)                                     # (B n,)
        x_t = pipeline.diffusion.q_sample(x_0, t, eps.repeat_interleave(n, dim=0))
        y, mask = matcher.encode_text([candidates.texts[i] for i in text.tolist()])
        score, _ = matcher(x_t, t, y, mask)
        score = score.view(batch_size, n)
        right, wrong = score[:, 0], score[:, 1:]
        loss = hinge_loss(right, wrong, cfg.margin)
        optimizer.zero_grad()
        loss.backward()
        if cfg.grad_clip:
            nn.utils.clip_grad_norm_(tuned.values(), cfg.grad_clip)
        optimizer.step()
        ahead = (right > wrong.amax(1)).float().mean()
        run.log(step, loss=loss, right=ahead)
        if run.due(step):
            run.save(step)
    matcher.requires_grad_(False)


def zero_shot(cfg):
    """The settings under which a matcher has nothing to tune."""
    return dataclasses.replace(cfg, prompts=0, head_weights=False, lora_rank=0)


def load_matcher(folder, device="auto", precision="auto", tuned=True):
    """The matcher of a run folder; tuned=False: its base, zero-shot."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"there is no run in {folder}/: tune one first, python dsd.py --train")
    cfg = common.read_config(Config, folder)
    device = common.pick_device(device)
    precision = common.pick_precision(precision, device)
    pipeline = uvit_fusion.load_pipeline(cfg.base, device, precision)
    if cfg.base_identity != pipeline.identity():
        raise UserError(f"{folder}/ was tuned for another network or text encoder than {cfg.base} "
                        "has now: tune it anew with --train")
    matcher = Matcher(cfg if tuned else zero_shot(cfg), pipeline)
    if tuned:
        path = folder / "model.safetensors"
        tensors = common.read_weights(path, f"checkpoint {path}")
        common.load_into(matcher, matcher.state_dict() | tensors, path)     # the rest is the base's
    return matcher.requires_grad_(False)


# --------------------------------------------------------------------------------------- the tasks
def read_groups(path):
    """The groups of a file with a JSON object a line; paths of images are relative to the file.

    {"pictures": ["a.jpg"], "texts": ["a dog", "a cat"], "right": 0}: one image and several texts,
    or several images and one text, of which number "right" is right. Two images and two texts
    without "right": image i goes with text i, as in Winoground. "kind" names a column of the table.
    """
    groups = common.read_json_lines(path, path, ())
    for n, group in enumerate(groups, 1):
        try:
            sizes = [len(group["pictures"]), len(group["texts"])]
            labelled = min(sizes) == 1 < max(sizes) and group.get("right") in range(max(sizes))
            winoground = sizes == [2, 2] and "right" not in group
            are_strings = [isinstance(name, str) for name in group["pictures"] + group["texts"]]
            if not (labelled or winoground) or not all(are_strings):
                raise ValueError
            group["pictures"] = [os.path.normpath(Path(path).parent / image)
                                 for image in group["pictures"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f'{path}, line {n}: expected {{"pictures": [...], "texts": [...], '
                            '"right": number}, one of the lists of length 1, or two of each '
                            "without right") from None
    return groups


def read_comvg(path, folder):
    """The groups of ComVG's CSV: a sentence, a right and a wrong image (<id>.jpg in a folder)."""
    images = {file.stem: str(file) for file in Path(folder).iterdir()
              if file.suffix.lower() in common.IMAGE_SUFFIXES}
    rng = random.Random(0)
    groups = []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        for row in rows:
            order = rng.sample(("pos", "neg"), 2)                      # the right one anywhere
            paths = [images[Path(row[f"{side}_image_id"]).stem] for side in order]
            triplets = zip(("subject", "verb", "object"), row["pos_triplet"].split(","),
                           row["neg_triplet"].split(","))
            changed = [name for name, a, b in triplets if a.strip() != b.strip()]
            kind = changed[0] if changed else "other"
            groups.append({"pictures": paths, "texts": [row["sentence"]],
                           "right": order.index("pos"), "kind": kind})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--comvg {path}: {error} is neither a column of it nor an image in "
                        f"{folder}/: see --pictures") from None
    return groups


def retrieval_groups(data, pool_size, size):
    """Each of the first validation images with all captions, and each caption with all images."""
    items = common.CaptionedImages(data, "val", size).items[:pool_size]
    paths = [str(path) for path, _, _ in items]
    texts = [caption for _, captions, _ in items for caption in captions]
    groups = []
    first = 0
    for i, (_, captions, _) in enumerate(items):
        own = list(range(first, first + len(captions)))                # each of them is right
        first += len(captions)
        groups.append({"pictures": [paths[i]], "texts": texts, "right": own, "kind": "text"})
        for caption in captions:
            groups.append({"pictures": paths, "texts": [caption], "right": [i], "kind": "picture"})
    return groups


def rank(scores, right):
    """Place of the right candidate, or of the best right one: 1 if it is above all others."""
    others = np.delete(scores, right)
    behind = np.max(scores[right]) > others                  # false in a tie and for nan
    return 1 + int((~behind).sum())


def verdicts(groups, tables):
    """Which groups are matched right: {"<kind>_<measure>": array of 0 and 1}.

    Measures: R@1, R@5 and R@10, where there are more candidates; in groups of two and two
    Winoground's text, image and group. "all": R@1 over all kinds, if all groups have two
    candidates. tables: for each group its scores (images, texts).
    """
    found = {}
    for group, table in zip(groups, tables):
        if "right" in group:
            place = rank(table.ravel(), group["right"])
            won = {f"R@{k}": place <= k for k in (1, 5, 10) if k < table.size}
        else:
            text = table[0, 0] > table[0, 1] and table[1, 1] > table[1, 0]
            image = table[0, 0] > table[1, 0] and table[1, 1] > table[0, 1]
            won = {"text": text, "image": image, "group": text and image}
        for measure, verdict in won.items():
            name = f"{group.get('kind', '')}_{measure}".strip("_")
            found.setdefault(name, []).append(verdict)
    if len(found) > 1 and all(table.size == 2 for table in tables):
        found["all"] = [rank(table.ravel(), group["right"]) == 1
                        for group, table in zip(groups, tables)]
    return {name: np.array(values, float) for name, values in found.items()}


def grade(candidates, scores, title):
    """Prints a table of several matchers, {label: scores (M,)}; returns {label: its verdicts}."""
    found = {}
    rows = []
    for label, values in scores.items():
        won = verdicts(candidates.groups, candidates.tables(values))
        cells = [f"{100 * w.mean():.1f} +- {100 * common.ci95(w):.1f}" for w in won.values()]
        found[label] = won
        rows.append([label, *cells])
    heading = ["right, %", *won]
    if "all" in won:                                     # two candidates: R@1 is the only measure
        heading = [name.removesuffix("_R@1") for name in heading]
    common.print_table([heading, *rows], f"{title}, {len(candidates.groups)} groups")
    return found


def grade_groups(matcher, groups, title):
    """Scores groups, prints a table and returns its figures, {"<kind>_<measure>": %}."""
    candidates = Candidates(groups, matcher.pipeline)
    scores = {"attention": attention_scores(matcher, candidates)}
    figures = {}
    for name, won in grade(candidates, scores, title)["attention"].items():
        figures |= common.percent(name, won)
    print(f"{len(candidates.pairs) * len(matcher.bank)} network evaluations")
    return figures


def pair_figures(won, name, prefix):
    """The toy world's figures: {name: % right of all, <prefix>count: of a kind, ...}."""
    figures = common.percent(name, won["all"])
    for kind in KINDS:
        figures |= common.percent(f"{prefix}{kind}", won[f"{kind}_R@1"])
    return figures


def grade_toy(matcher, groups):
    """Attention, zero-shot and tuned, on groups of the toy world: a table, and its figures."""
    candidates = Candidates(groups, matcher.pipeline)
    base = Matcher(zero_shot(matcher.cfg), matcher.pipeline)
    scores = {"attention, zero-shot": attention_scores(base, candidates),
              "attention, tuned": attention_scores(matcher, candidates)}
    before, after = grade(candidates, scores, "two texts that differ in one field").values()
    figures = pair_figures(before, "zero_shot", "zero_shot_")
    figures |= pair_figures(after, "accuracy", "")
    figures["relation_zero_shot"] = figures["zero_shot_relation"]
    figures["evaluations"] = len(matcher.bank) * len(candidates.pairs) / len(groups)
    figures["zero_shot_evaluations"] = figures["evaluations"]
    return figures


# -------------------------------------------------------------------------------- where words look
def find_words(tokenizer, text, length):
    """The words of a text, cut after `length` tokens: [(word, numbers of its tokens)]."""
    encoding = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
    found = []
    for word in re.finditer(r"\S+", text):
        tokens = [i for i, (start, end) in enumerate(encoding.offset_mapping)
                  if max(start, word.start()) < min(end, word.end())]          # they overlap
        if tokens:
            found.append((word.group(), tokens))
    return found


@torch.no_grad()
def attention_maps(matcher, x_0, text):
    """How each patch divides its attention among the tokens of a text: shares (side, side, L)."""
    y, mask = matcher.encode_text([text])
    w = matcher.w.abs() / matcher.w.abs().sum()                                       # (blocks, H)
    maps = 0
    for t, eps in matcher.bank:
        x_t = matcher.pipeline.diffusion.q_sample(x_0, t[None], eps[None])
        logits, _ = matcher.attention_logits(x_t, t[None], y, mask)
        # the gradient of LogSumExp is the softmax: what each token adds to the score of a patch
        shares = torch.cat(logits).softmax(-1)                                  # (blocks, H, N, L)
        maps = maps + (w[..., None, None] * shares).sum((0, 1)) / len(matcher.bank)
    side = math.isqrt(len(maps))
    return maps.view(side, side, -1).cpu().numpy()


def draw_attention(matcher, image, texts, scores, path):
    """For each text a row: the image, then for each word the patches that look at it most."""
    encoder = matcher.pipeline.text_encoder
    x_0 = matcher.pipeline.encode(image[None], sample=False)
    plain = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((144, 144), Image.NEAREST)
    white = Image.new("RGB", plain.size, "white")
    teal = Image.new("RGB", plain.size, "#00808c")                    # a colour that no shape has
    pale = Image.blend(plain, white, 0.65)
    words = [find_words(encoder.tokenizer, text, encoder.length) for text in texts]
    columns = 1 + max(len(row) for row in words)
    images = []
    labels = []
    for text, score, row in zip(texts, scores, words):
        maps = attention_maps(matcher, x_0, text)                     # (side, side, L)
        shares = [maps[..., tokens].sum(-1) for _, tokens in row]
        heat = np.stack([(share - share.mean()).clip(0) for share in shares])
        heat = np.uint8(0.85 * 255 * heat / max(heat.max(), 1e-6))    # one scale a row
        masks = [Image.fromarray(h).resize(plain.size, Image.BICUBIC) for h in heat]
        cells = [plain] + [Image.composite(teal, pale, mask) for mask in masks]
        images += [ImageOps.expand(cell, 1, "#cdcdcd") for cell in cells]
        labels += [f"score {score:.3f}"] + [word for word, _ in row]
        missing = columns - len(cells)                                # fill the row
        images += [ImageOps.expand(white, 1, "white")] * missing
        labels += [""] * missing
    common.image_grid([np.asarray(cell) for cell in images], labels, path, columns, titles=texts)


def rank_texts(matcher, path, texts, out):
    """Ranks texts for an image: prints their scores, and draws where each word looks."""
    candidates = Candidates([{"pictures": [path], "texts": texts}], matcher.pipeline)
    scores = candidates.tables(attention_scores(matcher, candidates))[0][0]   # of the one image
    order = np.argsort(-scores)
    texts = [texts[i] for i in order]
    scores = scores[order]
    rows = [[text, f"{score:.3f}"] for text, score in zip(texts, scores)]
    common.print_table([["text", "score"], *rows], path)
    draw_attention(matcher, candidates.images[0], texts, scores, out)
    print(f"where each word looks: {out}")


# -------------------------------------------------------------------------------------------- main
def toy_groups(pipeline):
    """The folder of the toy world's groups, match_*.jsonl, which are built on first need."""
    data = toy.prepare("shapes", pipeline.cfg.clip, pipeline.image_size)
    return Path(build_matching(data, pipeline.image_size)) / "annotations"


def labelled_groups(path, shots):
    """The first labelled groups of a file; shots: their number or, below 1, their share."""
    groups = [group for group in read_groups(path) if "right" in group]
    if not groups:
        raise UserError(f"--data {path}: no group with a right candidate to learn from")
    return groups[:max(1, round(shots * len(groups) if shots < 1 else shots))]


def train_and_grade(args):
    cfg = common.make_config(Config, PRESETS, args)
    folder = Path(args.out or "runs/dsd")
    common.check_run(folder, args)
    held_out = read_groups(args.groups) if args.groups else []   # a bad file stops here
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    pipeline = uvit_fusion.load_pipeline(cfg.base, device, precision)
    cfg = dataclasses.replace(cfg, base_identity=pipeline.identity())
    path = cfg.data
    if cfg.data == "shapes":
        annotations = toy_groups(pipeline)
        path = annotations / "match_train.jsonl"
    begin = time.time()
    groups = labelled_groups(path, cfg.shots)
    matcher = Matcher(cfg, pipeline)
    count = sum(p.numel() for p in matcher.tuned().values())
    train(cfg, matcher, Candidates(groups, pipeline), folder, args)
    print(f"tuned {count:,} parameters on {len(groups)} groups in {time.time() - begin:.0f} s")
    figures = {}
    if cfg.data == "shapes":
        groups = read_groups(annotations / "match_val.jsonl")[:len(KINDS) * args.samples]
        figures = grade_toy(matcher, groups)
        group = read_groups(annotations / "match_ten.jsonl")[0]
        right = group["texts"].pop(group["right"])
        texts = [right, *group["texts"][:3]]
        rank_texts(matcher, group["pictures"][0], texts, folder / "samples" / "attention.png")
    if held_out:
        figures |= grade_groups(matcher, held_out, args.groups)
    figures["seconds"] = time.time() - begin
    figures["peak_memory_mb"] = common.peak_memory_mb()
    common.write_results(folder, figures)
    print(f"{figures['seconds']:.0f} s; figures in {folder / 'results.json'}")


def match(args):
    """What a tuned run is for: ranks texts for an image, or grades groups."""
    if args.picture and not args.texts:
        raise UserError("name texts to rank, each in quotes, after the picture")
    matcher = load_matcher(args.run, args.device, args.precision, tuned=not args.zero_shot)
    if args.picture:
        out = args.out or Path(args.run) / "samples" / f"{Path(args.picture).stem}.png"
        rank_texts(matcher, args.picture, args.texts, out)
        return
    if args.groups:
        groups = read_groups(args.groups)
    elif args.comvg:
        groups = read_comvg(args.comvg, args.pictures)
    else:
        data = "data/shapes" if args.retrieval == "shapes" else args.retrieval
        groups = retrieval_groups(data, args.pool_size, matcher.pipeline.image_size)
    grade_groups(matcher, groups, args.groups or args.comvg or args.retrieval)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_argument_group("what to do")
    action.add_argument("picture", nargs="?", help="an image to rank texts for")
    action.add_argument("texts", nargs="*", help="the texts")
    action.add_argument("--train", action="store_true", help="tune on labelled groups, and grade")
    action.add_argument("--groups", help="score the groups of a file; also after --train")
    action.add_argument("--comvg", help="score ComVG's pairs of images, in its CSV file")
    action.add_argument("--retrieval", help="find texts for images and images for texts: "
                        '"shapes", or a folder in the layout of MS-COCO')
    parser.add_argument("--run", default="runs/dsd", help="tuned run (default %(default)s)")
    parser.add_argument("--zero-shot", action="store_true", help="score with the base, not tuned")
    parser.add_argument("--pictures", default=".", help="--comvg: the folder of its images")
    parser.add_argument("--pool-size", type=common.positive, default=50,
                        help="--retrieval: number of images (default %(default)s)")
    parser.add_argument("--samples", type=common.positive, default=512,
                        help="--train: held-out pairs of each kind (default %(default)s)")
    common.add_training_flags(parser, "run folder of --train (default runs/dsd), or the file for "
                              "the attention to a picture")
    common.add_config_flags(parser, Config, PRESETS)
    args = parser.parse_args()
    actions = [args.train, args.picture, args.comvg, args.retrieval, args.groups and not args.train]
    if sum(map(bool, actions)) > 1:
        raise UserError("choose one of --train, a picture, --groups, --comvg and --retrieval")
    if args.train:
        train_and_grade(args)
    elif any(actions):
        match(args)
    else:
        parser.print_help()


if __name__ == "__main__":
    common.entry(main)
