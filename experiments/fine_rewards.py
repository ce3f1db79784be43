"""Fine-grained rewards: which of them chooses right images, which teaches what, and their mistakes.

    python -m experiments.fine_rewards choose --samples 300      # no training: 3 min
    python -m experiments.fine_rewards compare --prompts 300 --steps 150 --samples 1024 \
        --base runs/deep/step2000.safetensors                    # 15 min
    python -m experiments.fine_rewards analyse --samples 256

choose lets each reward pick one of K candidates of the base for each prompt of two groups, and
has the judge grade them. compare fine-tunes the same base with the same budget, on images selected
in different ways. Each run is in <out>/<variant>/. A finished run is kept and an interrupted one
resumes, so the command can be repeated. analyse counts how often a reward puts the right
caption of a rendered image above one that is wrong in a single field. Ties count a half: 50 % is
chance.

All print a table and write results.json into <out>. Settings were chosen with `--first 2048`, on
held-out captions that no table reports.
"""
import argparse
import copy
import dataclasses
import random
from pathlib import Path

import numpy as np
import torch

import common
import fine_rewards
import image_data
from common import UserError
from experiments.fusion import seed_interval
from fine_rewards import PRESETS, Config, Rewards, aggregate_ranks
from toy import gain, judge, shapes

# weights of the ranks by each reward; sam_two_sided is `--sam-score two-sided`
CHOICES = {
    "caption_sam": {"caption": 1, "sam": 1},         # the paper's own pair
    "caption": {"caption": 1},
    "sam": {"sam": 1},
    "clip": {"clip": 1},
    "caption_clip": {"caption": 1, "clip": 1},
    "sam_quarter": {"caption": 1, "sam": 0.25, "clip": 1},
    "sam_half": {"caption": 1, "sam": 0.5, "clip": 1},                     # the toy preset's
    "sam_whole": {"caption": 1, "sam": 1, "clip": 1},
    "sam_two_sided": {"sam_two_sided": 1},
    "caption_sam_two_sided": {"caption": 1, "sam_two_sided": 1},
    "sam_half_two_sided": {"caption": 1, "sam_two_sided": 0.5, "clip": 1},
    "sam_whole_two_sided": {"caption": 1, "sam_two_sided": 1, "clip": 1},
}

# settings that are changed; weights are of the ranks by caption, SAM, CLIP and aesthetic reward.
# All but rank_sum_real have --real 0: real images would hide what the selection does.
VARIANTS = {
    "real_pictures": {},                             # images of the data set, none generated
    "random": {},                                    # generated, selected at random
    "clip_only": {"weights": (0.0, 0.0, 1.0, 0.0)},
    "caption_only": {"weights": (1.0, 0.0, 0.0, 0.0)},
    "sam_only": {"weights": (0.0, 1.0, 0.0, 0.0)},
    "caption_sam": {"weights": (1.0, 1.0, 0.0, 0.0)},                 # the paper's own pair
    "sum": {},                                       # of standardised rewards, not of ranks
    "rank_sum_real": {"real": 0.5},                  # as fine_rewards.py does
    "dpo": {"learn": "dpo", "lr": 5e-4, "batch_size": 32},  # the best against the worst, by rank
    "rank_sum": {},                                  # by rank, the best alone
}


# ------------------------------------------------------------------------------------------ choose
def inspect_candidates(candidates, scenes):
    """What the judge sees in K candidates for each of P scenes: {name: (P, K)}.

    "right"; "things", their number; "kinds", the number of those that differ in colour or shape.
    """
    seen = {"right": [], "things": [], "kinds": []}
    for images, scene in zip(candidates, scenes):
        for things in judge.parse(images):
            seen["right"].append(judge.judge(things, scene)["all"])
            seen["things"].append(len(things))
            seen["kinds"].append(len({(thing.colour, thing.shape) for thing in things}))
    return {name: np.reshape(values, candidates.shape[:2]) for name, values in seen.items()}


def choose(cfg, args, folder):
    """What share of the images that each reward chooses is right, and how many things they show.

    Each chooses one of K candidates for each of args.samples held-out captions of two groups.
    """
    pipeline, data, _ = fine_rewards.load_base(cfg, args)
    scenes, captions, _ = judge.validation_scenes(data, 2048, args.first)
    of_two_groups = [i for i, scene in enumerate(scenes) if scene.relation][:args.samples]
    scenes = [scenes[i] for i in of_two_groups]
    prompts = [captions[i] for i in of_two_groups]
    candidates = fine_rewards.sample_candidates(cfg, pipeline, prompts, 0)      # (P, K, H, W, 3)
    one_sided = dataclasses.replace(cfg, sam_score="one-sided", weights=(1.0, 1.0, 1.0, 0.0))
    two_sided = dataclasses.replace(cfg, sam_score="two-sided", weights=(0.0, 1.0, 0.0, 0.0))
    rewards = Rewards(one_sided, pipeline)
    scores = fine_rewards.score(rewards, candidates, prompts)
    scores["sam_two_sided"] = fine_rewards.score(
        Rewards(two_sided, pipeline), candidates, prompts)["sam"]

    seen = inspect_candidates(candidates, scenes)
    best = {"oracle": seen["right"].argmax(1)}       # (P,): a right one, or else the first
    for name, weights in CHOICES.items():
        used = {reward: scores[reward] for reward in weights}
        best[name] = aggregate_ranks(used, weights).argmin(1)
    images = candidates.reshape(-1, *candidates.shape[2:])
    distances = gain.diversity(images, rewards.clip, each=cfg.candidates)
    figures = {name: float(values.mean()) for name, values in distances.items()}
    table = [["chosen by", "right, %", "+-", "things", "kinds"]]
    rows = np.arange(len(prompts))
    for name in ("random", *best):
        chosen = {}
        for key, values in seen.items():             # a random one is like the mean of all
            chosen[key] = values.mean(1) if name == "random" else values[rows, best[name]]
        share = common.percent(name, chosen["right"])
        things = float(chosen["things"].mean())
        kinds = float(chosen["kinds"].mean())
        table.append([name, *share.values(), f"{things:.2f}", f"{kinds:.2f}"])
        figures |= share | {f"{name}_things": things, f"{name}_kinds": kinds}
    named = np.mean([sum(group.count for group in scene.groups) for scene in scenes])
    common.print_table(table, f"{len(prompts)} prompts, {cfg.candidates} candidates of each; the "
                       f"prompts name {named:.2f} things; diversity {figures['diversity']:.3f}")
    common.write_results(folder, figures | {"named_things": float(named)})


# ------------------------------------------------------------------------------------------ compare
class RandomReward:
    """A reward that knows nothing: candidates and prompts are selected at random."""
    weights = {"random": 1.0}

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, images, prompts):
        return {"random": self.rng.random(len(images))}


class SumOfRewards:
    """The weighted sum of the rewards as one reward, each brought to mean 0 and deviation 1."""
    weights = {"sum": 1.0}

    def __init__(self, rewards):
        self.rewards = rewards

    def __call__(self, images, prompts):
        total = 0.0
        for name, values in self.rewards(images, prompts).items():
            standardised = (values - values.mean()) / max(values.std(), 1e-9)
            total = total + self.rewards.weights[name] * standardised
        return {"sum": total}


def finetune_on_real_images(cfg, pipeline, dataset, folder, args):
    """Learns from real images: as many, with their captions, as the other variants learn from."""
    images = []
    prompts = []
    count = fine_rewards.n_keep(cfg.keep, cfg.prompts)
    for n in range(cfg.rounds):
        asked, indices = fine_rewards.round_prompts(cfg, dataset, n)
        images += [dataset.image(i) for i in indices[:count]]
        prompts += asked[:count]
        fine_rewards.finetune_lora(
            cfg, pipeline, torch.stack(images), prompts, n, folder / f"round{n + 1}", args)
    fine_rewards.save_model(cfg, pipeline, folder)


def train_variant(name, cfg, dataset, folder, args):
    """Fine-tunes the base in one way; returns its pipeline."""
    cfg = dataclasses.replace(cfg, **({"real": 0.0} | VARIANTS[name]))
    pipeline, _, cfg = fine_rewards.load_base(cfg, args)
    args = copy.copy(args)
    args.resume = not args.overwrite and any(folder.rglob("state.pt"))
    if name == "real_pictures":
        finetune_on_real_images(cfg, pipeline, dataset, folder, args)
        return pipeline
    if name == "random":
        rewards = RandomReward(cfg.seed)
    else:
        rewards = Rewards(cfg, pipeline)
    if name == "sum":
        rewards = SumOfRewards(rewards)
    fine_rewards.raft(cfg, pipeline, rewards, dataset, folder, args)
    return pipeline


def measure_seeds(name, start, cfg, dataset, data, folder, args):
    """Trains a variant with each seed; returns mean `gain.measure` figures and the variety lost."""
    runs = []
    lost = []
    for seed in range(args.seeds):
        run_folder = folder / (f"{name}_seed{seed}" if seed else name)
        seeded = dataclasses.replace(cfg, seed=cfg.seed + seed)
        pipeline = train_variant(name, seeded, dataset, run_folder, args)
        runs.append(gain.measure(
            pipeline, data, args.samples, first=args.first, steps=cfg.sample_steps))
        lost.append(gain.variety_lost(start, runs[-1]))
    measured = {key: np.mean([run[key] for run in runs], axis=0) for key in start}
    if args.seeds == 1:
        return measured | lost[0]                    # with an interval over captions
    values = [run["variety_lost_percent"] for run in lost]
    return measured | {"variety_lost_percent": float(np.mean(values)),
                       "variety_lost_percent_ci": seed_interval(values)}


def compare(cfg, args, folder):
    """Trains the variants and grades them on the same captions and noise."""
    base, data, _ = fine_rewards.load_base(cfg, args)
    dataset = image_data.CaptionedImages(data, "train", base.image_size)
    measures = ("distance", "diversity", "clip_diversity")
    rows = [["all right, %", "", "+-", "gain", "+-", *measures, "variety lost, %", "+-"]]
    start = gain.measure(base, data, args.samples, first=args.first, steps=cfg.sample_steps)
    all_right = {}
    figures = {}
    for name in ("start", *args.variants):
        if name == "start":
            measured = start | gain.variety_lost(start, start)
        else:
            measured = measure_seeds(name, start, cfg, dataset, data, folder, args)
        all_right[name] = measured["right"]
        share = common.percent(name, measured["right"])
        gained = common.percent("gain", measured["right"] - start["right"])
        lost = {key: measured[key] for key in ("variety_lost_percent", "variety_lost_percent_ci")}
        means = {measure: float(np.mean(measured[measure])) for measure in measures}
        figures |= share
        figures |= {f"{name}_{key}": value for key, value in (gained | lost | means).items()}
        rows.append([name, *share.values(), *gained.values()])
        rows[-1] += [f"{value:.4f}" for value in means.values()] + list(lost.values())
        common.write_results(folder, figures)
    common.print_table(rows, f"{folder}: {args.samples} held-out captions, {args.seeds} seeds")
    for name, right in all_right.items():
        ahead = common.percent(f"ahead_of_{name}", measured["right"] - right)
        common.write_results(folder, ahead)
        points, interval = ahead.values()
        print(f"{args.variants[-1]} is ahead of {name} by {points:.1f} +- {interval:.1f} points")


# ------------------------------------------------------------------------------------------ analyse
def analyse(cfg, args, folder):
    """Scores rendered images against their right captions and against hard negatives."""
    pipeline, data, _ = fine_rewards.load_base(cfg, args)
    rewards = Rewards(cfg, pipeline)
    dataset = image_data.CaptionedImages(data, "val", pipeline.image_size)
    scenes, captions, _ = judge.validation_scenes(data, args.samples, args.first)
    rng = random.Random(0)
    figures = {}
    rows = [["right above wrong, %", *rewards.weights, "all"]]
    for field in ("count", "colour", "shape", "relation"):
        chosen = [i for i, scene in enumerate(scenes) if scene.relation or field != "relation"]
        images = np.stack([dataset.image(args.first + i).permute(1, 2, 0).numpy() for i in chosen])
        wrong = [shapes.sentence(shapes.change_field(scenes[i], field, rng), rng) for i in chosen]
        of_right = rewards(images, [captions[i] for i in chosen])
        of_wrong = rewards(images, wrong)
        # 1 if the right caption is ahead, 0 if both are equal, -1 if it is behind
        signs = {name: np.sign(of_right[name] - of_wrong[name]) for name in of_right}
        votes = sum(weight * signs[name] for name, weight in rewards.weights.items())
        signs["all"] = np.sign(votes)                # with two, the vote decides the sum of ranks
        shares = {name: 50 * float(1 + sign.mean()) for name, sign in signs.items()}
        rows.append([field, *shares.values()])
        figures |= {f"{field}_{name}": share for name, share in shares.items()}
    common.print_table(rows, f"{len(scenes)} rendered held-out images")
    common.write_results(folder, figures)


EXPERIMENTS = {"choose": choose, "compare": compare, "analyse": analyse}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out captions or images (default %(default)s)")
    parser.add_argument("--first", type=common.natural, default=0,
                        help="number of the first of them (2048: for choosing settings)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS),
                        help="compare: those to train (default: all)")
    parser.add_argument("--seeds", type=common.positive, default=1,
                        help="compare: trainings of each variant")
    common.add_training_flags(
        parser, "default runs/rewards_choose, runs/rewards_compare, runs/rewards_analyse")
    common.add_config_flags(parser, Config, PRESETS)
    args = parser.parse_args()
    if args.experiment == "compare":
        common.refuse_flags(parser, args, ["real"], "each variant has its own")
    cfg = common.make_config(Config, PRESETS, args)
    if cfg.data != "shapes":
        raise UserError("--data: the judge knows only the toy world: leave it out")
    folder = Path(args.out or f"runs/rewards_{args.experiment}")
    EXPERIMENTS[args.experiment](cfg, args, folder)


if __name__ == "__main__":
    common.entry(main)
