"""Fine-grained rewards: which of them teaches what, and which mistakes each of them notices.

    python -m experiments.fine_rewards compare --prompts 300 --steps 150 --samples 1024   # 12 min
    python -m experiments.fine_rewards analyse --samples 256

compare fine-tunes the same base with the same budget, on images selected in different ways. Each
run stands in <out>/<variant>/. A finished run is kept and an interrupted one goes on, so the
command can be given again. analyse counts how often a reward puts the right caption of a rendered
image above one that is wrong in a single field. Equals count a half: 50 % is chance.

Both print a table and write results.json into <out>.
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
from common import UserError
from fine_rewards import PRESETS, Config, Rewards, aggregate_ranks
from toy import gain, judge, shapes

# weights of the caption, SAM, CLIP and aesthetic ranks; None: the settings', if any are needed
VARIANTS = {
    "real_pictures": None,                           # of the data set, nothing is generated
    "random": None,                                  # generated, selected at random
    "clip_only": (0.0, 0.0, 1.0, 0.0),
    "caption_only": (1.0, 0.0, 0.0, 0.0),
    "sam_only": (0.0, 1.0, 0.0, 0.0),
    "sum": None,                                     # of standardised rewards, not of ranks
    "rank_sum": None,                                # as fine_rewards.py does
}


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
    pipeline, _, cfg = fine_rewards.load_base(cfg, args)
    args = copy.copy(args)
    args.resume = not args.overwrite and any(folder.rglob("state.pt"))
    if name == "real_pictures":
        finetune_on_real_images(cfg, pipeline, dataset, folder, args)
        return pipeline
    if name == "random":
        rewards = RandomReward(cfg.seed)
    else:
        weights = VARIANTS[name] or cfg.weights
        cfg = dataclasses.replace(cfg, weights=weights)
        rewards = Rewards(cfg, pipeline.cfg.clip, pipeline.device, pipeline.precision)
    if name == "sum":
        rewards = SumOfRewards(rewards)
    fine_rewards.raft(cfg, pipeline, rewards, dataset, folder, args)
    return pipeline


def compare(cfg, args, folder):
    """Trains all variants and grades them on the same captions and noise."""
    base, data, _ = fine_rewards.load_base(cfg, args)
    dataset = common.CaptionedImages(data, "train", base.image_size)
    measures = ("distance", "diversity", "clip_diversity")
    rows = [["all right, %", "", "+-", "gain", "+-", *measures]]
    figures = {}
    right = {}
    for name in ("start", *VARIANTS):
        pipeline = base
        if name != "start":
            pipeline = train_variant(name, cfg, dataset, folder / name, args)
        measured = gain.measure(pipeline, data, args.samples, steps=cfg.sample_steps)
        right[name] = measured["right"]
        share = common.percent(name, right[name])
        gained = common.percent("gain", right[name] - right["start"])
        figures |= share | {f"{name}_{measure}": measured[measure] for measure in measures}
        rows.append([name, *share.values(), *gained.values()])
        rows[-1] += [f"{measured[measure]:.4f}" for measure in measures]
        common.write_results(folder, figures)
    over_random = right["rank_sum"] - right["random"]
    common.write_results(folder, common.percent("gain_over_random", over_random))
    common.print_table(rows, f"{folder}: {args.samples} held-out captions")
    for name, verdicts in right.items():
        points, interval = common.percent("gain", right["rank_sum"] - verdicts).values()
        print(f"rank_sum is ahead of {name} by {points:.1f} +- {interval:.1f} points")


# ------------------------------------------------------------------------------------------ analyse
def analyse(cfg, args, folder):
    """Scores rendered images against their right captions and against hard negatives."""
    pipeline, data, _ = fine_rewards.load_base(cfg, args)
    rewards = Rewards(cfg, pipeline.cfg.clip, pipeline.device, pipeline.precision)
    dataset = common.CaptionedImages(data, "val", pipeline.image_size)
    scenes, captions, _ = judge.validation_scenes(data, args.samples)
    rng = random.Random(0)
    figures = {}
    rows = [["right above wrong, %", *rewards.weights, "all"]]
    for field in ("count", "colour", "shape", "relation"):
        chosen = [i for i, scene in enumerate(scenes) if scene.relation or field != "relation"]
        images = np.stack([dataset.image(i).permute(1, 2, 0).numpy() for i in chosen])
        wrong = [shapes.sentence(shapes.change_field(scenes[i], field, rng), rng) for i in chosen]
        of_right = rewards(images, [captions[i] for i in chosen])
        of_wrong = rewards(images, wrong)
        both = {name: np.stack([of_right[name], of_wrong[name]], axis=1) for name in of_right}
        ahead = {name: values[:, 0] - values[:, 1] for name, values in both.items()}
        total = aggregate_ranks(both, rewards.weights)                     # the smaller, the better
        ahead["all"] = total[:, 1] - total[:, 0]
        # a sign of 1, 0, -1 counts as 100, 50, 0 %
        shares = {name: 50 * float(1 + np.sign(values).mean()) for name, values in ahead.items()}
        rows.append([field, *shares.values()])
        figures |= {f"{field}_{name}": share for name, share in shares.items()}
    common.print_table(rows, f"{len(scenes)} rendered held-out images")
    common.write_results(folder, figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["compare", "analyse"])
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out captions or images (default %(default)s)")
    common.add_training_flags(parser, "default runs/rewards_compare, runs/rewards_analyse")
    common.add_config_flags(parser, Config, PRESETS)
    args = parser.parse_args()
    cfg = common.make_config(Config, PRESETS, args)
    if cfg.data != "shapes":
        raise UserError("--data: the judge knows the toy world only: leave it out")
    folder = Path(args.out or f"runs/rewards_{args.experiment}")
    experiment = compare if args.experiment == "compare" else analyse
    experiment(cfg, args, folder)


if __name__ == "__main__":
    common.entry(main)
