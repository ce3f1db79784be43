"""The matcher beside its rivals, on the toy world and on any groups.

    python dsd.py --train                                        # first: tunes runs/dsd
    python -m experiments.dsd compare                            # adds its figures to runs/dsd
    python -m experiments.dsd grade --groups winoground.jsonl    # any groups of candidates
    python -m experiments.dsd grade --comvg comvg.csv --pictures path/to/images
    python -m experiments.dsd grade --retrieval path/to/coco --score itm

Rivals are the tiny CLIP, zero-shot and tuned on the same groups, and errors of the same network,
not tuned. With error = eps_theta(x_t, t, text) - eps, empty = eps_theta(x_t, t, "") - eps, and
means over (t, eps) and pixels:
    denoising = - mean |error|^2                           Diffusion Classifier, arXiv 2303.16203
    itm       = mean |empty|^2 - mean |error|^2            DiffusionITM, arXiv 2305.16397
In the network's own units the error is output - target, of which its training took the mean square.
Of a network that predicts eps this is the same; of one that predicts x_0 the error of eps is that
of x_0 times sqrt(abar_t / (1 - abar_t)), by which the lowest t outweighs all others.
"""
import argparse
import copy
import csv
import dataclasses
import io
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import dsd
import encoders
import image_data
from common import UserError
from toy import matching
from toy.matching import rank

LABELS = {
    "clip_zero_shot": "tiny CLIP, zero-shot",
    "clip_few_shot": "tiny CLIP, tuned on the same",
    "zero_shot": "attention, zero-shot",
    "accuracy": "attention, tuned",
    "accuracy_one": "attention, tuned, one t",
    "hybrid": "hybrid, zero-shot",
    "hybrid_tuned": "hybrid, tuned",
    "denoising": "denoising error of eps, t 10 to 990, pruned",
    "denoising_own_units": "denoising error in own units, t 10 to 990, pruned",
    "denoising_middle": "denoising error of eps, t 600 to 800",
    "denoising_one": "denoising error of eps, t 700",
    "itm": "DiffusionITM, t 600 to 800",
}


# -------------------------------------------------------------------------- by the network's error
def noise_error(diffusion, output, x_0, x_t, t, eps):
    """mean |eps_theta - eps|^2 of each sample, (B,), whatever the network predicts."""
    _, eps_theta = diffusion.predict(output, x_t, t)
    return (eps_theta - eps).square().mean((1, 2, 3))


def target_error(diffusion, output, x_0, x_t, t, eps):
    """The same in the network's own units, those of its loss."""
    return (output - diffusion.target_of(x_0, t, eps)).square().mean((1, 2, 3))


@torch.no_grad()
def mean_error(matcher, x_0, texts, bank, error, batch_size=256):
    """The error of M images x_0, each with its text, its mean over the noise bank: (M,)."""
    diffusion = matcher.pipeline.diffusion
    errors = []
    for i in tqdm(range(0, len(texts), batch_size), "matching", leave=False):
        x = x_0[i:i + batch_size]
        y, mask = matcher.encode_text(texts[i:i + batch_size])
        errors_at_t = []
        for t, eps in bank:
            t = t.expand(len(x))
            eps = eps.expand_as(x)
            x_t = diffusion.q_sample(x, t, eps)
            _, _, output = matcher.attention_logits(x_t, t, y, mask)
            errors_at_t.append(error(diffusion, output, x, x_t, t, eps))
        errors.append(torch.stack(errors_at_t).mean(0).cpu())
    return torch.cat(errors)


def pair_error(matcher, candidates, bank, error, rows=slice(None)):
    """`mean_error` of the pairs of candidates, or of some rows of them."""
    image, text = candidates.pairs[rows].T
    texts = [candidates.texts[i] for i in text.tolist()]
    return mean_error(matcher, candidates.x_0[image], texts, bank, error)


def empty_error(matcher, candidates, bank, error):
    """The error without a text, evaluated once for each image; for each pair that of its image."""
    texts = [""] * len(candidates.x_0)
    return mean_error(matcher, candidates.x_0, texts, bank, error)[candidates.pairs[:, 0]]


def denoising(matcher, candidates, bank, error):
    """Diffusion Classifier. Returns scores (M,) and the number of evaluations, as all below."""
    scores = -pair_error(matcher, candidates, bank, error)
    return scores, len(candidates.pairs) * len(bank)


def itm(matcher, candidates, bank, error):
    """DiffusionITM: the error that the text takes away."""
    scores = empty_error(matcher, candidates, bank, error)
    scores = scores - pair_error(matcher, candidates, bank, error)
    return scores, (len(candidates.pairs) + len(candidates.x_0)) * len(bank)


def by_attention(matcher, candidates, bank=None):
    """The attention score or, with matcher.cfg.score "hybrid", the hybrid; bank: another one."""
    bank = bank or matcher.bank
    evaluations = len(candidates.pairs) * len(bank)
    if matcher.cfg.score == "hybrid":
        evaluations += len(candidates.x_0) * len(bank)
    return dsd.match(matcher, candidates, bank), evaluations


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


def pruned_denoising(matcher, candidates, bank, error, every=4):
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
        errors[rows, n] = pair_error(matcher, candidates, [noise], error, rows)
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

    An image is compared with all texts of the batch and a text with all images, which costs a CLIP
    nothing. Judged on other training groups, the hinge loss, LoRA, rates of 3e-5 to 4e-3, 200 and
    500 steps were no better.
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
        images = sorted({image for image, _ in pairs})                     # numbers, each once
        texts = sorted({text for _, text in pairs})
        image, text = clip_features(
            clip, candidates.images[images], [candidates.texts[i] for i in texts])
        logits = 50 * image @ text.T                                       # (images, texts)
        row = torch.tensor([images.index(right[0]) for right, _, _ in batch], device=clip.device)
        column = torch.tensor([texts.index(right[1]) for right, _, _ in batch], device=clip.device)
        loss = F.cross_entropy(logits[row], column) + F.cross_entropy(logits.T[column], row)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clip.model.requires_grad_(False)
    return clip


# ------------------------------------------------------------------------------------- any groups
def read_comvg(path, folder):
    """The groups of ComVG's CSV: a sentence, a right and a wrong image (<id>.jpg in a folder)."""
    images = {file.stem: str(file) for file in Path(folder).iterdir()
              if file.suffix.lower() in image_data.IMAGE_SUFFIXES}
    rng = random.Random(0)
    groups = []
    hint = f"it must be a column of the file, or an image in {folder}/: see --pictures"
    with common.reading(f"--comvg {path}", hint):
        rows = list(csv.DictReader(io.StringIO(common.read_text(path))))
        if not rows:
            raise ValueError("it has no rows")
        for row in rows:
            order = rng.sample(("pos", "neg"), 2)                      # the right one anywhere
            paths = [images[Path(row[f"{side}_image_id"]).stem] for side in order]
            triplets = zip(("subject", "verb", "object"), row["pos_triplet"].split(","),
                           row["neg_triplet"].split(","))
            changed = [name for name, a, b in triplets if a.strip() != b.strip()]
            kind = changed[0] if changed else "other"
            groups.append({"pictures": paths, "texts": [row["sentence"].strip()],
                           "right": order.index("pos"), "kind": kind})
    return groups


def retrieval_groups(data, pool_size, size):
    """Each of the first validation images with all captions, and each caption with all images."""
    items = image_data.CaptionedImages(data, "val", size).items[:pool_size]
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
        found["all"] = matching.matched(groups, tables)
    return {name: np.array(values, float) for name, values in found.items()}


def load_for_grading(parser, args):
    """The matcher of `grade`: the tuned run or, zero-shot, its base or the one that is named."""
    of_error = args.score in ("denoising", "itm")
    if args.zero_shot:
        common.refuse_flags(parser, args, ["run"], "--zero-shot matches without a tuned run")
        cfg = dsd.Config(base=args.base)
        matcher = dsd.zero_shot(cfg, dsd.load_base(cfg.base, args))
    else:
        common.refuse_flags(parser, args, ["base"], "a tuned run has its own base; see --zero-shot")
        matcher = dsd.load_matcher(args.run, args)
        if of_error:                                        # as published: of the network as it was
            matcher = dsd.zero_shot(matcher.cfg, matcher.pipeline)
    changes = {"times": (10, 990), "evaluations": 10} if of_error else {}
    if args.score and not of_error:
        changes["score"] = args.score
    if args.times:
        changes["times"] = tuple(args.times)
    if args.evaluations:
        changes["evaluations"] = args.evaluations
    matcher.cfg = dataclasses.replace(matcher.cfg, **changes)
    matcher.bank = dsd.noise_bank(matcher.pipeline, matcher.cfg.times, matcher.cfg.evaluations)
    return matcher


def grade(parser, args):
    """Scores the groups of a file, of ComVG or of retrieval, and prints a table."""
    if not args.comvg:
        common.refuse_flags(parser, args, ["pictures"], "it names the folder of --comvg's images")
    if not args.retrieval:
        common.refuse_flags(parser, args, ["pool_size"], "it belongs to --retrieval")
    matcher = load_for_grading(parser, args)
    if args.groups:
        groups = matching.read_groups(args.groups)
    elif args.comvg:
        groups = read_comvg(args.comvg, args.pictures)
    else:
        data = "data/shapes" if args.retrieval == "shapes" else args.retrieval
        groups = retrieval_groups(data, args.pool_size, matcher.pipeline.image_size)
    candidates = dsd.Candidates(groups, matcher.pipeline)
    score = args.score or matcher.cfg.score
    if score in ("attention", "hybrid"):
        scores, evaluations = by_attention(matcher, candidates)
    else:
        rival = {"denoising": denoising, "itm": itm}[score]
        scores, evaluations = rival(matcher, candidates, matcher.bank, target_error)
    won = verdicts(groups, candidates.tables(scores))
    cells = [f"{100 * w.mean():.1f} +- {100 * common.ci95(w):.1f}" for w in won.values()]
    names = [name.removesuffix("_R@1") if "all" in won else name for name in won]
    label = f"{score}, {'tuned' if matcher.cfg.lora_rank else 'zero-shot'}"
    common.print_table([["right, %", *names], [label, *cells]],
                       f"{args.groups or args.comvg or args.retrieval}, {len(groups)} groups")
    print(f"{evaluations} network evaluations")


# ----------------------------------------------------------------------------------------- compare
def tune_hybrid(tuned, candidates, folder):
    """A matcher tuned as `tuned` was, but by the hybrid score, as the release does."""
    cfg = dataclasses.replace(tuned.cfg, score="hybrid")
    matcher = dsd.Matcher(cfg, tuned.pipeline)
    args = argparse.Namespace(resume=(folder / "state.pt").exists(), overwrite=False)
    dsd.train(cfg, matcher, candidates, folder, args)
    return matcher


def score_all(candidates, matchers):
    """Every way to match: {name in LABELS: (scores (M,), number of network evaluations)}."""
    base = matchers["base"]
    pipeline = base.pipeline
    one = dsd.noise_bank(pipeline, base.cfg.times, 1)
    anywhere = dsd.noise_bank(pipeline, (10, 990), 50)
    # where this network decides what it generates; the training groups show it, too
    middle = dsd.noise_bank(pipeline, (600, 800), base.cfg.evaluations)
    middle_one = dsd.noise_bank(pipeline, (600, 800), 1)
    return {
        "clip_zero_shot": clip_scores(matchers["clip"], candidates),
        "clip_few_shot": clip_scores(matchers["tuned_clip"], candidates),
        "zero_shot": by_attention(base, candidates),
        "accuracy": by_attention(matchers["tuned"], candidates),
        "accuracy_one": by_attention(matchers["tuned"], candidates, one),
        "hybrid": by_attention(matchers["hybrid"], candidates),
        "hybrid_tuned": by_attention(matchers["hybrid_tuned"], candidates),
        "denoising": pruned_denoising(base, candidates, anywhere, noise_error),
        "denoising_own_units": pruned_denoising(base, candidates, anywhere, target_error),
        "denoising_middle": denoising(base, candidates, middle, noise_error),
        "denoising_one": denoising(base, candidates, middle_one, noise_error),
        "itm": itm(base, candidates, middle, noise_error),
    }


def compare_pairs(annotations, samples, matchers):
    """One image and two texts, two images and one text: prints a table, returns its figures."""
    groups = matching.read_groups(annotations / "match_val.jsonl")[:len(matching.KINDS) * samples]
    pairs = dsd.Candidates(groups, matchers["base"].pipeline)
    groups = matching.read_groups(annotations / "match_pictures.jsonl")
    pictures = dsd.Candidates(groups, matchers["base"].pipeline)
    of_pictures = score_all(pictures, matchers)
    figures = {}
    rows = [["right, %", "evaluations", *matching.PAIR_COLUMNS]]
    for name, (scores, evaluations) in score_all(pairs, matchers).items():
        figures |= matching.pair_figures(name, pairs.groups, pairs.tables(scores))
        tables = pictures.tables(of_pictures[name][0])
        figures |= matching.picture_figures(name, pictures.groups, tables)
        count = evaluations / len(pairs.groups)
        figures[f"{matching.figure_prefix(name)}evaluations"] = count
        won = matching.matched(pictures.groups, tables)
        figures[f"pictures_{name}_R@1"] = 100 * float(won.mean())
        rows.append([LABELS[name], f"{count:.0f}", *matching.pair_row(name, figures)])
    common.print_table(rows, f"{len(pairs.groups)} images with two texts, {len(pictures.groups)} "
                       "texts with two images: the wrong one differs in one field")
    figures["relation_zero_shot"] = figures["zero_shot_relation"]
    figures["relation_over_clip"] = figures["relation"] - figures["clip_relation"]
    figures["over_clip_few_shot"] = figures["accuracy"] - figures["clip_few_shot"]
    return figures


def compare_tasks(annotations, count, matchers):
    """Ten texts for an image, and Winoground: prints a table, returns its figures."""
    figures = {}
    rows = {name: [label] for name, label in LABELS.items()}
    for task in ("ten", "winoground"):
        groups = matching.read_groups(annotations / f"match_{task}.jsonl")[:count]
        groups = [group | {"kind": ""} for group in groups]              # no row for each kind
        candidates = dsd.Candidates(groups, matchers["base"].pipeline)
        for name, (scores, _) in score_all(candidates, matchers).items():
            for measure, won in verdicts(groups, candidates.tables(scores)).items():
                figures[f"{task}_{name}_{measure}"] = 100 * float(won.mean())
                rows[name].append(figures[f"{task}_{name}_{measure}"])
    heading = ["right, %", "ten texts, R@1", "R@5", "swapped: text", "image", "group"]
    widest = 1.96 * 50 * count**-0.5                             # the interval where 50 % are right
    common.print_table([heading, *rows.values()],
                       f"other tasks, {count} groups each, +- {widest:.0f} at the most")
    return figures


def compare(args):
    tuned = dsd.load_matcher(args.run, args)
    cfg = tuned.cfg
    pipeline = tuned.pipeline
    if cfg.data != "shapes" or cfg.score != "attention":
        raise UserError(f"{args.run}/ was tuned on {cfg.data} by its {cfg.score} score: the rivals "
                        "are graded on the toy world, and beside the attention score")
    begin = time.time()
    annotations = dsd.toy_groups(pipeline)
    groups = dsd.labelled_groups(annotations / "match_tune.jsonl", cfg.shots)
    candidates = dsd.Candidates(groups, pipeline)
    clip = encoders.ClipScorer(pipeline.cfg.clip, pipeline.device)
    hybrid = dataclasses.replace(cfg, score="hybrid")
    matchers = {
        "tuned": tuned,
        "base": dsd.zero_shot(cfg, pipeline),
        "hybrid": dsd.zero_shot(hybrid, pipeline),
        "hybrid_tuned": tune_hybrid(tuned, candidates, Path(args.run) / "hybrid"),
        "clip": clip,
        "tuned_clip": tune_clip(clip, candidates),
    }
    figures = compare_pairs(annotations, args.samples, matchers)
    figures |= compare_tasks(annotations, args.others, matchers)
    figures["compare_seconds"] = time.time() - begin
    common.write_results(args.run, figures)


# -------------------------------------------------------------------------------------------- main
def add_grade_flags(parser):
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--groups", help="groups of a file: RefCOCOg, VQA, Winoground")
    task.add_argument("--comvg", help="ComVG's pairs of images, in its CSV file")
    task.add_argument("--retrieval", help="find texts for images and images for texts: "
                      '"shapes", or a folder in the layout of MS-COCO')
    parser.add_argument("--pictures", default=".", help="--comvg: the folder of its images")
    parser.add_argument("--pool-size", type=common.positive, default=50,
                        help="--retrieval: number of images (default %(default)s)")
    parser.add_argument("--score", choices=("attention", "denoising", "itm", "hybrid"),
                        help="default: what the run was tuned for; denoising and itm are of the "
                        "network before tuning, in its own units")
    parser.add_argument("--zero-shot", action="store_true",
                        help="match with --base as it is, without a tuned run")
    parser.add_argument("--base", default=dsd.Config.base, help="default %(default)s")
    parser.add_argument("--times", type=common.positive, nargs=2,
                        help="lowest and highest t (default: the run's; denoising and itm 10 990)")
    parser.add_argument("--evaluations", type=common.positive,
                        help="values of t (default: the run's; denoising and itm 10)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    experiments = parser.add_subparsers(dest="experiment", required=True, help="what to do")
    of_compare = experiments.add_parser("compare", help="the rivals on the toy world")
    of_compare.add_argument("--samples", type=common.positive, default=256,
                            help="held-out pairs of each kind (default %(default)s)")
    of_compare.add_argument("--others", type=common.positive, default=128,
                            help="groups of each other task (default %(default)s)")
    of_grade = experiments.add_parser("grade", help="any groups of candidates, by any score")
    add_grade_flags(of_grade)
    for each in (of_compare, of_grade):
        each.add_argument("--run", default="runs/dsd", help="tuned run (default %(default)s)")
        common.add_device_flags(each)
    args = parser.parse_args()
    if args.experiment == "grade":
        grade(of_grade, args)
    else:
        compare(args)


if __name__ == "__main__":
    common.entry(main)
