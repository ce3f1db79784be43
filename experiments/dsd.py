"""The matcher and its rivals, on the toy world and on any groups.

    python dsd.py --train                                        # first: tunes runs/dsd
    python -m experiments.dsd compare                            # adds its figures to runs/dsd
    python -m experiments.dsd grade --groups winoground.jsonl    # any groups of candidates
    python -m experiments.dsd grade --comvg comvg.csv path/to/images
    python -m experiments.dsd grade --retrieval path/to/coco --score itm

Rivals are the tiny CLIP, zero-shot and tuned on the same groups, and errors of the same network,
untuned. With error = eps_theta(x_t, t, text) - eps, empty = eps_theta(x_t, t, "") - eps, and
means over (t, eps) and pixels:
    denoising = - mean |error|^2                           Diffusion Classifier, arXiv 2303.16203
    itm       = mean |empty|^2 - mean |error|^2            DiffusionITM, arXiv 2305.16397
In the network's own units the error is output - target, whose mean square is its training loss.
For a network that predicts eps this is the same; for one that predicts x_0 the error of eps is that
of x_0 times sqrt(abar_t / (1 - abar_t)), which makes the lowest t outweigh all others.
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
def noise_error(matcher, x_0, t, eps, y, mask):
    """mean |eps_theta - eps|^2 of each pair, (B,), whatever the network predicts."""
    diffusion = matcher.pipeline.diffusion
    x_t = diffusion.q_sample(x_0, t, eps)
    _, _, output = matcher.attention_logits(x_t, t, y, mask)
    _, eps_theta = diffusion.predict(output, x_t, t)
    return (eps_theta - eps).square().mean((1, 2, 3))


def target_error(matcher, x_0, t, eps, y, mask):
    """The same in the network's own units, those of its loss."""
    diffusion = matcher.pipeline.diffusion
    x_t = diffusion.q_sample(x_0, t, eps)
    _, _, output = matcher.attention_logits(x_t, t, y, mask)
    return (output - diffusion.target_of(x_0, t, eps)).square().mean((1, 2, 3))


def empty_error(matcher, candidates, bank, error):
    """The error without a text, evaluated once for each image; for each pair that of its image."""
    without_text = copy.copy(candidates)
    without_text.texts = [""]
    without_text.pairs = torch.tensor([(image, 0) for image in range(len(candidates.x_0))])
    return dsd.match(matcher, without_text, bank, error)[candidates.pairs[:, 0]]


def denoising(matcher, candidates, bank, error):
    """Diffusion Classifier: like all rivals, scores (M,) and the number of evaluations."""
    scores = -dsd.match(matcher, candidates, bank, error)
    return scores, len(candidates.pairs) * len(bank)


def itm(matcher, candidates, bank, error):
    """DiffusionITM: the error that the text takes away."""
    scores = empty_error(matcher, candidates, bank, error)
    scores = scores - dsd.match(matcher, candidates, bank, error)
    return scores, (len(candidates.pairs) + len(candidates.x_0)) * len(bank)


# ------------------------------------------------------------------------------------ with pruning
def prune_candidates(errors, candidates, alive):
    """Removes from `alive` (M,) candidates that are surely behind the best of their group.

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
    """`denoising`, but after every four (t, eps), candidates that are surely behind drop out.

    A dropped candidate scores -inf. The last one of a group is no longer evaluated.
    """
    errors = torch.full((len(candidates.pairs), len(bank)), math.nan)      # nan: not evaluated
    alive = torch.ones(len(candidates.pairs), dtype=torch.bool)
    contested = copy.copy(candidates)
    evaluations = 0
    for n, noise in enumerate(bank):                                       # (t, eps)
        rows = [members[alive[members]] for members in candidates.members
                if alive[members].sum() > 1]
        if not rows:
            break
        rows = torch.cat(rows)
        contested.pairs = candidates.pairs[rows]
        errors[rows, n] = dsd.match(matcher, contested, [noise], error)
        evaluations += len(rows)
        if n % every == every - 1:
            prune_candidates(errors[:, :n + 1], candidates, alive)
    return torch.where(alive, -errors.nanmean(1), -math.inf), evaluations


# ----------------------------------------------------------------------------------------- by CLIP
@torch.no_grad()
def clip_scores(clip, candidates, batch_size=256):
    """The cosine of each pair; it needs no evaluation of the network."""
    images = candidates.images.permute(0, 2, 3, 1)                         # (I, H, W, 3)
    scores = []
    for pairs in candidates.pairs.split(batch_size):
        image = clip.images(images[pairs[:, 0]])
        text = clip.texts([candidates.texts[i] for i in pairs[:, 1].tolist()])
        scores.append((image * text).sum(-1).cpu())
    return torch.cat(scores), 0


def tune_clip(clip, candidates, steps=150, batch_size=64, lr=1e-4):
    """A copy of a CLIP, all of it tuned on labelled groups with CLIP's own loss.

    An image is compared with all texts of the batch and a text with all images, which costs a CLIP
    nothing. Judged on other training groups, the hinge loss, LoRA, learning rates of 3e-5 to 4e-3,
    200 and 500 steps were no better.
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
        image = clip.images(candidates.images[images].permute(0, 2, 3, 1))
        text = clip.texts([candidates.texts[i] for i in texts])
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
    hint = f"it must be a column of the file, or an image in {folder}/"
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


def load_for_grading(args):
    """The matcher of `grade`, with its score, times and evaluations."""
    matcher = dsd.load_matcher(args.run, args)
    changes = {}
    if args.score in ("denoising", "itm"):          # as published: the network before tuning
        matcher = dsd.zero_shot(matcher.cfg, matcher.pipeline)
        changes = {"times": (10, 990), "evaluations": 10}
    elif args.score:
        changes = {"score": args.score}
    if args.times:
        changes["times"] = tuple(args.times)
    if args.evaluations:
        changes["evaluations"] = args.evaluations
    matcher.cfg = dataclasses.replace(matcher.cfg, **changes)
    matcher.bank = dsd.noise_bank(matcher.pipeline, matcher.cfg.times, matcher.cfg.evaluations)
    return matcher


def grade(parser, args):
    """Scores the groups of a file, of ComVG or of retrieval, and prints a table."""
    if not args.retrieval:
        common.refuse_flags(parser, args, ["pool_size"], "it needs --retrieval")
    matcher = load_for_grading(args)
    name = args.groups or args.retrieval
    if args.groups:
        groups = matching.read_groups(args.groups)
    elif args.comvg:
        name, images = args.comvg
        groups = read_comvg(name, images)
    else:
        data = "data/shapes" if args.retrieval == "shapes" else args.retrieval
        groups = retrieval_groups(data, args.pool_size, matcher.pipeline.image_size)
    candidates = dsd.Candidates(groups, matcher.pipeline)
    score = args.score or matcher.cfg.score
    if score in ("attention", "hybrid"):
        scores, evaluations = dsd.match_and_count(matcher, candidates)
    else:
        rival = {"denoising": denoising, "itm": itm}[score]
        scores, evaluations = rival(matcher, candidates, matcher.bank, target_error)
    won = verdicts(groups, candidates.tables(scores))
    cells = [f"{100 * w.mean():.1f} +- {100 * common.ci95(w):.1f}" for w in won.values()]
    names = [name.removesuffix("_R@1") if "all" in won else name for name in won]
    cfg = matcher.cfg
    is_tuned = cfg.lora_rank or cfg.prompts or cfg.head_weights
    label = f"{score}, {'tuned' if is_tuned else 'zero-shot'}"
    common.print_table([["right, %", *names], [label, *cells]],
                       f"{name}: {len(groups)} groups")
    print(f"{evaluations} network evaluations")


# ----------------------------------------------------------------------------------------- compare
def tune_hybrid(tuned, candidates, folder, overwrite):
    """A matcher tuned as `tuned` was, but with the hybrid score, as in the release."""
    cfg = dataclasses.replace(tuned.cfg, score="hybrid")
    matcher = dsd.Matcher(cfg, tuned.pipeline)
    resume = not overwrite and (folder / "state.pt").exists()
    args = argparse.Namespace(resume=resume, overwrite=overwrite)
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
        "zero_shot": dsd.match_and_count(base, candidates),
        "accuracy": dsd.match_and_count(matchers["tuned"], candidates),
        "accuracy_one": dsd.match_and_count(matchers["tuned"], candidates, one),
        "hybrid": dsd.match_and_count(matchers["hybrid"], candidates),
        "hybrid_tuned": dsd.match_and_count(matchers["hybrid_tuned"], candidates),
        "denoising": pruned_denoising(base, candidates, anywhere, noise_error),
        "denoising_own_units": pruned_denoising(base, candidates, anywhere, target_error),
        "denoising_middle": denoising(base, candidates, middle, noise_error),
        "denoising_one": denoising(base, candidates, middle_one, noise_error),
        "itm": itm(base, candidates, middle, noise_error),
    }


def compare_pairs(pipeline, samples, matchers):
    """Two texts for an image, two images for a text: prints a table, returns its figures."""
    pairs, pictures = dsd.toy_candidates(pipeline, samples)
    figures = matching.grade_pairs(
        pairs, score_all(pairs, matchers), pictures, score_all(pictures, matchers), LABELS)
    figures["relation_over_clip"] = figures["relation"] - figures["clip_relation"]
    figures["over_clip_few_shot"] = figures["accuracy"] - figures["clip_few_shot"]
    for name in LABELS:                                          # named as in the other tasks
        prefix = matching.figure_prefix(name)
        figures[f"pictures_{name}_R@1"] = figures[f"{prefix}one_text_two_pictures"]
    return figures


def compare_tasks(pipeline, count, matchers):
    """Ten texts for an image, and Winoground: prints a table, returns its figures."""
    annotations = dsd.toy_groups(pipeline)
    figures = {}
    rows = {name: [label] for name, label in LABELS.items()}
    for task in ("ten", "winoground"):
        groups = matching.read_groups(annotations / f"match_{task}.jsonl")[:count]
        groups = [group | {"kind": ""} for group in groups]              # no row for each kind
        candidates = dsd.Candidates(groups, pipeline)
        for name, (scores, _) in score_all(candidates, matchers).items():
            for measure, won in verdicts(groups, candidates.tables(scores)).items():
                figures[f"{task}_{name}_{measure}"] = 100 * float(won.mean())
                rows[name].append(figures[f"{task}_{name}_{measure}"])
    heading = ["right, %", "ten texts, R@1", "R@5", "swapped: text", "image", "group"]
    widest = 1.96 * 50 * count**-0.5                             # the interval where 50 % are right
    common.print_table([heading, *rows.values()],
                       f"other tasks, {count} groups each, +- {widest:.0f} at most")
    return figures


def compare(args):
    folder, _ = common.run_files(args.run)
    tuned = dsd.load_matcher(args.run, args)
    cfg = tuned.cfg
    pipeline = tuned.pipeline
    # a run that was not tuned has no base_identity
    if not cfg.base_identity or cfg.data != "shapes" or cfg.score != "attention":
        raise UserError(f"{args.run}/: name a run that was tuned on the toy world with the "
                        "attention score: the rivals are graded there, next to it")
    begin = time.time()
    candidates = dsd.Candidates(dsd.labelled_groups(cfg, pipeline), pipeline)
    clip = encoders.ClipScorer(pipeline.cfg.clip, pipeline.device)
    hybrid = dataclasses.replace(cfg, score="hybrid")
    matchers = {
        "tuned": tuned,
        "base": dsd.zero_shot(cfg, pipeline),
        "hybrid": dsd.zero_shot(hybrid, pipeline),
        "hybrid_tuned": tune_hybrid(tuned, candidates, folder / "hybrid", args.overwrite),
        "clip": clip,
        "tuned_clip": tune_clip(clip, candidates),
    }
    figures = compare_pairs(pipeline, args.samples, matchers)
    figures |= compare_tasks(pipeline, args.others, matchers)
    figures["compare_seconds"] = time.time() - begin
    common.write_results(folder, figures)


# -------------------------------------------------------------------------------------------- main
def add_grade_flags(parser):
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--groups", help="file of groups: RefCOCOg, VQA, Winoground")
    task.add_argument("--comvg", nargs=2, metavar=("CSV", "FOLDER"),
                      help="ComVG's pairs of images: its file, and the folder of the images")
    task.add_argument("--retrieval", help="find texts for images and images for texts: "
                      '"shapes", or a folder in the layout of MS-COCO')
    parser.add_argument("--pool-size", type=common.positive, default=50,
                        help="--retrieval: number of images (default %(default)s)")
    parser.add_argument("--score", choices=("attention", "denoising", "itm", "hybrid"),
                        help="default: what the run was tuned for; denoising and itm use the "
                        "network before tuning, in its own units")
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
    of_compare.add_argument("--run", default="runs/dsd", help="tuned run (default %(default)s)")
    of_compare.add_argument("--overwrite", action="store_true", help="tune the hybrid again")
    of_grade = experiments.add_parser("grade", help="any groups of candidates, by any score")
    of_grade.add_argument("--run", default="runs/dsd", help="tuned run; or one of uvit_fusion.py "
                          "or fine_rewards.py, graded zero-shot (default %(default)s)")
    add_grade_flags(of_grade)
    for each in (of_compare, of_grade):
        common.add_device_flags(each)
    args = parser.parse_args()
    if args.experiment == "grade":
        grade(of_grade, args)
    else:
        compare(args)


if __name__ == "__main__":
    common.entry(main)
