"""The matcher beside its rivals on the toy world: what attention is worth, and what tuning is.

    python dsd.py --train                    # first: tunes runs/dsd
    python -m experiments.dsd compare        # adds its figures to runs/dsd/results.json

Rivals are the tiny CLIP, zero-shot and tuned on the same groups, and errors of the same network,
not tuned. With error = eps_theta(x_t, t, text) - eps, empty = eps_theta(x_t, t, "") - eps, and
means over (t, eps) and pixels:
    denoising = - mean |error|^2                           Diffusion Classifier, arXiv 2303.16203
    itm       = mean |empty|^2 - mean |error|^2            DiffusionITM, arXiv 2305.16397
    hybrid    = attention + mean |empty| - mean |error|    the release of Discriminative SD
"""
import argparse
import copy
import math
import random
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import dsd
from common import UserError
from toy.matching import KINDS

LABELS = {
    "clip_zero_shot": "tiny CLIP, zero-shot",
    "clip_few_shot": "tiny CLIP, tuned on the same",
    "zero_shot": "attention, zero-shot",
    "accuracy": "attention, tuned",
    "accuracy_one": "attention, tuned, one t",
    "hybrid": "hybrid of the release, zero-shot",
    "denoising": "denoising error, t 10 to 990, pruned",
    "denoising_middle": "denoising error, t 600 to 800",
    "denoising_one": "denoising error, t 700",
    "itm": "DiffusionITM, t 600 to 800",
}


# -------------------------------------------------------------------------- by the network's error
def mean_square(error):
    return error.square().mean((1, 2, 3))


def mean_absolute(error):
    return error.abs().mean((1, 2, 3))


@torch.no_grad()
def evaluate_pairs(matcher, x_0, texts, bank, measure, batch_size=256):
    """Score and error of M images x_0, each with its text: (M,) and (M,), means over the bank."""
    scores = []
    errors = []
    for i in tqdm(range(0, len(texts), batch_size), "matching", leave=False):
        x = x_0[i:i + batch_size]
        y, mask = matcher.encode_text(texts[i:i + batch_size])
        found = [dsd.evaluate(matcher, x, y, mask, t, eps) for t, eps in bank]
        scores.append(torch.stack([score for score, _ in found]).mean(0).cpu())
        errors.append(torch.stack([measure(error) for _, error in found]).mean(0).cpu())
    return torch.cat(scores), torch.cat(errors)


def evaluate_candidates(matcher, candidates, bank, measure, rows=slice(None)):
    """`evaluate_pairs` of the pairs of candidates, or of some rows of them."""
    image, text = candidates.pairs[rows].T
    texts = [candidates.texts[i] for i in text.tolist()]
    return evaluate_pairs(matcher, candidates.x_0[image], texts, bank, measure)


def empty_error(matcher, candidates, bank, measure):
    """The error without a text, evaluated once for each image; for each pair that of its image."""
    texts = [""] * len(candidates.x_0)
    _, error = evaluate_pairs(matcher, candidates.x_0, texts, bank, measure)
    return error[candidates.pairs[:, 0]]


def denoising(matcher, candidates, bank):
    """Diffusion Classifier. Returns scores (M,) and the number of evaluations, as all below."""
    _, error = evaluate_candidates(matcher, candidates, bank, mean_square)
    return -error, len(candidates.pairs) * len(bank)


def itm(matcher, candidates, bank):
    """DiffusionITM: the error that the text takes away."""
    _, error = evaluate_candidates(matcher, candidates, bank, mean_square)
    scores = empty_error(matcher, candidates, bank, mean_square) - error
    return scores, (len(candidates.pairs) + len(candidates.x_0)) * len(bank)


def hybrid(matcher, candidates, bank):
    """The release: the attention score, and the error that the text takes away."""
    score, error = evaluate_candidates(matcher, candidates, bank, mean_absolute)
    scores = score + empty_error(matcher, candidates, bank, mean_absolute) - error
    return scores, (len(candidates.pairs) + len(candidates.x_0)) * len(bank)


def attention(matcher, candidates, bank):
    scores = dsd.attention_scores(matcher, candidates, bank)
    return scores, len(candidates.pairs) * len(bank)


# ------------------------------------------------------------------------------------ with pruning
def prune_candidates(errors, candidates, alive):
    """Takes candidates out of `alive` (M,) that are surely behind the best of their group.

    Surely: by more than two standard errors of the difference. Groups of two and two stay whole,
    as all their scores are compared. errors (M, n): a column for each (t, eps).
    """
    for group, members in zip(candidates.groups, candidates.members):
        left = members[alive[members]]
        if len(left) > 1 and "right" in group:
            best = left[errors[left].mean(1).argmin()]
            behind = errors[left] - errors[best]                       # (candidates, n)
            standard_error = behind.std(1) / behind.shape[1]**0.5
            alive[left] = behind.mean(1) <= 2 * standard_error


def pruned_denoising(matcher, candidates, bank, every=4):
    """`denoising`, but after every four (t, eps) candidates that are surely behind drop out.

    A dropped candidate scores -inf. The last one of a group is not evaluated any more.
    """
    errors = torch.full((len(candidates.pairs), len(bank)), math.nan)      # nan: not evaluated
    alive = torch.ones(len(candidates.pairs), dtype=torch.bool)
    evaluations = 0
    for n, noise in enumerate(bank):                                       # (t, eps)
        contested = [members[alive[members]] for members in candidates.members
                     if alive[members].sum() > 1]
        if not contested:
            break
        rows = torch.cat(contested)
        _, errors[rows, n] = evaluate_candidates(matcher, candidates, [noise], mean_square, rows)
        evaluations += len(rows)
        if n % every == every - 1:
            prune_candidates(errors[:, :n + 1], candidates, alive)
    return torch.where(alive, -errors.nanmean(1), -math.inf), evaluations


# ----------------------------------------------------------------------------------------- by CLIP
def clip_features(clip, images, texts):
    """Unit vectors of images uint8 (B, 3, H, W) and texts; unlike ClipScorer's with a gradient."""
    pixels = images.to(clip.device).float() / 255
    if pixels.shape[-1] != clip.side:
        pixels = F.interpolate(pixels, (clip.side, clip.side), mode="bicubic", antialias=True)
    image = clip.model.get_image_features(pixel_values=(pixels - clip.mean) / clip.std)
    tokens = clip.tokenizer(texts, padding=True, truncation=True, max_length=clip.length,
                            return_tensors="pt").to(clip.device)
    text = clip.model.get_text_features(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return F.normalize(image.pooler_output, dim=-1), F.normalize(text.pooler_output, dim=-1)


@torch.no_grad()
def clip_scores(clip, candidates, batch_size=256):
    """The cosine of each pair; it needs no evaluation of the network."""
    scores = []
    for pairs in candidates.pairs.split(batch_size):
        texts = [candidates.texts[i] for i in pairs[:, 1].tolist()]
        image, text = clip_features(clip, candidates.images[pairs[:, 0]], texts)
        scores.append((image * text).sum(-1).cpu())
    return torch.cat(scores), 0


def tune_clip(clip, candidates, steps=150, batch_size=64, lr=1e-4):
    """A copy of a CLIP, all of it tuned on labelled groups by CLIP's own loss.

    An image is compared with all texts of the batch, which costs a CLIP nothing. Judged on other
    training groups, the hinge loss, LoRA, rates of 3e-5 to 4e-3, 200 and 500 steps were no better.
    """
    clip = copy.copy(clip)
    clip.model = copy.deepcopy(clip.model).requires_grad_(True)
    examples = dsd.hard_negatives(candidates, needed=0)
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=lr)
    rng = random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = rng.sample(examples, min(batch_size, len(examples)))
        pairs = [pair for right, wrong, _ in batch for pair in [right, *wrong]]
        texts = sorted({text for _, text in pairs})                        # numbers, each once
        images = candidates.images[[right[0] for right, _, _ in batch]]
        image, text = clip_features(clip, images, [candidates.texts[i] for i in texts])
        answers = torch.tensor([texts.index(right[1]) for right, _, _ in batch])
        loss = F.cross_entropy(50 * image @ text.T, answers.to(clip.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip.model.requires_grad_(False)
    return clip


# ----------------------------------------------------------------------------------------- compare
def score_all(candidates, tuned, base, clip, tuned_clip):
    """Every way to match: {name in LABELS: (scores (M,), number of network evaluations)}."""
    cfg = base.cfg
    one = dsd.noise_bank(base.pipeline, cfg.times, 1)
    anywhere = dsd.noise_bank(base.pipeline, (10, 990), 50)
    # where this network decides what it generates; the 256 training groups show it, too
    middle = dsd.noise_bank(base.pipeline, (600, 800), cfg.evaluations)
    middle_one = dsd.noise_bank(base.pipeline, (600, 800), 1)
    return {
        "clip_zero_shot": clip_scores(clip, candidates),
        "clip_few_shot": clip_scores(tuned_clip, candidates),
        "zero_shot": attention(base, candidates, base.bank),
        "accuracy": attention(tuned, candidates, base.bank),
        "accuracy_one": attention(tuned, candidates, one),
        "hybrid": hybrid(base, candidates, base.bank),
        "denoising": pruned_denoising(base, candidates, anywhere),
        "denoising_middle": denoising(base, candidates, middle),
        "denoising_one": denoising(base, candidates, middle_one),
        "itm": itm(base, candidates, middle),
    }


def compare_pairs(groups, matchers):
    """One image, two texts that differ in one field: prints a table, returns its figures."""
    candidates = dsd.Candidates(groups, matchers[0].pipeline)
    figures = {}
    rows = [["right, %", "evaluations", *KINDS, "all", "+-"]]
    for name, (scores, evaluations) in score_all(candidates, *matchers).items():
        prefix = {"accuracy": "", "clip_zero_shot": "clip_"}.get(name, f"{name}_")     # of figures
        won = dsd.verdicts(groups, candidates.tables(scores))
        figures |= dsd.pair_figures(won, name, prefix)
        figures[f"{prefix}evaluations"] = evaluations / len(groups)
        rows.append([LABELS[name], f"{evaluations / len(groups):.0f}",
                     *(figures[f"{prefix}{kind}"] for kind in KINDS),
                     figures[name], figures[f"{name}_ci"]])
    common.print_table(rows, f"two texts that differ in one field, {len(groups)} groups")
    figures["relation_zero_shot"] = figures["zero_shot_relation"]
    figures["relation_over_clip"] = figures["relation"] - figures["clip_relation"]
    figures["over_clip_few_shot"] = figures["accuracy"] - figures["clip_few_shot"]
    return figures


def compare_tasks(annotations, count, matchers):
    """Two images for a text, ten texts for an image, Winoground: a table, and its figures."""
    figures = {}
    rows = {name: [label] for name, label in LABELS.items()}
    for task in ("pictures", "ten", "winoground"):
        groups = dsd.read_groups(annotations / f"match_{task}.jsonl")[:count]
        groups = [group | {"kind": ""} for group in groups]              # no row for each kind
        candidates = dsd.Candidates(groups, matchers[0].pipeline)
        for name, (scores, _) in score_all(candidates, *matchers).items():
            for measure, won in dsd.verdicts(groups, candidates.tables(scores)).items():
                figures[f"{task}_{name}_{measure}"] = 100 * float(won.mean())
                rows[name].append(figures[f"{task}_{name}_{measure}"])
    heading = ["right, %", "two images", "ten texts, R@1", "R@5", "swapped: text", "image", "group"]
    widest = 1.96 * 50 * count**-0.5                             # the interval where 50 % are right
    common.print_table([heading, *rows.values()],
                       f"other tasks, {count} groups each, +- {widest:.0f} at the most")
    return figures


def compare(args):
    tuned = dsd.load_matcher(args.run, args.device, args.precision)
    cfg = tuned.cfg
    pipeline = tuned.pipeline
    if cfg.data != "shapes":
        raise UserError(f"{args.run}/ was tuned on {cfg.data}: the rivals are graded on the toy "
                        "world, --data shapes")
    annotations = dsd.toy_groups(pipeline)
    begin = time.time()
    groups = dsd.labelled_groups(annotations / "match_train.jsonl", cfg.shots)
    clip = common.ClipScorer(pipeline.cfg.clip, pipeline.device)
    tuned_clip = tune_clip(clip, dsd.Candidates(groups, pipeline))
    base = dsd.Matcher(dsd.zero_shot(cfg), pipeline)
    matchers = [tuned, base, clip, tuned_clip]
    pairs = dsd.read_groups(annotations / "match_val.jsonl")[:len(KINDS) * args.samples]
    figures = compare_pairs(pairs, matchers)
    figures |= compare_tasks(annotations, args.others, matchers)
    figures["compare_seconds"] = time.time() - begin
    common.write_results(args.run, figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["compare"], help="what to do")
    parser.add_argument("--run", default="runs/dsd", help="tuned run (default %(default)s)")
    parser.add_argument("--samples", type=common.positive, default=512,
                        help="held-out pairs of each kind (default %(default)s)")
    parser.add_argument("--others", type=common.positive, default=128,
                        help="groups of each other task (default %(default)s)")
    common.add_device_flags(parser)
    compare(parser.parse_args())


if __name__ == "__main__":
    common.entry(main)
