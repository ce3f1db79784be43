"""SUR-adapter: what each part of the loss gives, and what the defects of the released code cost.

    python -m experiments.sur_adapter compare --steps 1000 --samples 512

Trains each variant with the same data, steps and noise, grades it on held-out scenes, as narratives
and as plain captions, prints one table and writes results.json into runs/sur_compare. A variant
that is finished is kept, so the command can be given again.
"""
import argparse
import csv
import dataclasses
from pathlib import Path

import torch.nn as nn

import common
import sur_adapter
import toy.narratives
from common import UserError
from sur_adapter import PRESETS, Adapter, Config, feature_kl
from uvit_fusion import softmax_attention


# ----------------------------------------------------------------------------------- the adapters
class TeacherProjection(Adapter):
    """P maps the LLM's state to the adapter's width. Trained, it can shrink what it teaches."""
    def __init__(self, cfg, dim, llm_dim):
        super().__init__(cfg, dim, llm_dim)
        self.project = nn.Linear(llm_dim, dim)

    def llm_loss(self, llm_features, h, token_mask, temperature):
        """D(P mean of LLM(v), h)"""
        teacher = self.project(llm_features)[:, None]                               # (B, 1, d)
        return feature_kl(teacher, h, token_mask, temperature)


class FrozenProjection(TeacherProjection):
    """The same, but random and frozen, as in the release."""
    def __init__(self, cfg, dim, llm_dim):
        super().__init__(cfg, dim, llm_dim)
        self.project.requires_grad_(False)


class AsReleased(FrozenProjection):
    """The adapter of the released code, whose noise loss gives it no gradient: see ABLATIONS."""
    def __init__(self, cfg, dim, llm_dim):
        super().__init__(cfg, dim, llm_dim)
        self.fc = nn.Linear(dim, dim)                   # only its weight starts at zero
        nn.init.zeros_(self.fc.weight)

    def forward(self, x, mask):
        # batch_first was left out: (B, L, d) was read as B tokens of L prompts
        h = self.encode(x.transpose(0, 1), bias=None).transpose(0, 1)               # (B, L, d)
        w = softmax_attention(self.query(h), self.key(x), x) + x
        a = self.mlp(w) + w
        y = (1 - self.eta) * x + self.eta * self.fc(a)  # not x, even where fc is zero
        return y, h


# the settings that each variant changes
ABLATIONS = {
    "as_intended": {},
    # at eta 1 nothing would be left of x; a noise loss without gradient is one without weight
    "as_released": {"eta": 0.1, "noise_weight": 0.0},
    "paper_w": {"residual": "x"},
    "no_llm": {"llm_weight": 0.0},
    "no_prompt": {"prompt_weight": 0.0},
    "no_noise": {"noise_weight": 0.0},
    "teacher": {},
    "frozen": {},
}
ADAPTERS = {"as_released": AsReleased, "teacher": TeacherProjection, "frozen": FrozenProjection}


# ------------------------------------------------------------------------------- the comparison
def grade(pipeline, data, args):
    """% of held-out scenes all right: narrative and plain, narrative_ci and plain_ci."""
    _, tables = toy.narratives.grade(pipeline, data, args.samples, steps=args.sample_steps)
    narrative = common.percent("narrative", tables["narrative"]["all"])
    return narrative | common.percent("plain", tables["plain"]["all"])


def run_variant(name, cfg, base, llm, dataset, data, folder, args):
    """Trains and grades a variant, or reads the figures of one that is finished."""
    if (folder / "results.json").exists() and not args.overwrite:
        if common.read_config(Config, folder) != cfg:
            raise UserError(f"{folder}/ was made with other settings: give the same ones, "
                            "--overwrite, or another --out")
        return common.read_json(folder / "results.json")
    print(f"\n{name}, into {folder}/")
    run_args = argparse.Namespace(resume=not args.overwrite, overwrite=args.overwrite)
    adapter_class = ADAPTERS.get(name, Adapter)
    pipeline = sur_adapter.train(cfg, base, llm, dataset, folder, run_args, adapter_class)
    figures = grade(pipeline, data, args)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figures["llm"] = float(rows[-1]["llm"])
    common.write_results(folder, figures)
    return figures


def compare(args):
    cfg = common.make_config(Config, PRESETS, args)
    folder = Path(args.out or "runs/sur_compare")
    base, data, llm, cfg = sur_adapter.prepare(cfg, args)
    dataset = sur_adapter.load_triples(base, Path(data) / "train2017")
    results = {"base": grade(base, data, args)}
    for name, change in ABLATIONS.items():
        variant = dataclasses.replace(cfg, **change)
        results[name] = run_variant(
            name, variant, base, llm, dataset, data, folder / name, args)

    rows = [["all right, %", "narratives", "+-", "plain", "LLM term at the end"]]
    figures = {}
    for name, result in results.items():
        figures[name] = result["narrative"]
        figures[f"{name}_ci"] = result["narrative_ci"]
        figures[f"{name}_plain"] = result["plain"]
        learned_from_llm = name not in ("base", "no_llm")
        term = f"{result['llm']:.2f}" if learned_from_llm else ""
        rows.append([name, figures[name], figures[f"{name}_ci"], figures[f"{name}_plain"], term])
    common.write_results(folder, figures)
    common.print_table(rows, f"{folder}: {args.samples} held-out scenes, {cfg.steps} steps of "
                       f"training, {args.sample_steps} of sampling")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["compare"])
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10,
                        help="sampling steps of a graded image (default %(default)s)")
    common.add_training_flags(parser, "folder of the runs (default runs/sur_compare)")
    common.add_config_flags(parser, Config, PRESETS)
    compare(parser.parse_args())


if __name__ == "__main__":
    common.entry(main)
