"""SUR-adapter: what the LLM and each part of the loss add, and what the released defects cost.

    python -m experiments.sur_adapter unheard --steps 600 --samples 512
    python -m experiments.sur_adapter compare --base runs/deep --steps 1000 --samples 512

Trains each variant with the same data, steps and noise. Grades it on held-out scenes, told in three
ways: plain captions, narratives with the triples' words in new pairs, and narratives with an
unheard word that only the LLM has read. A rival is graded too: the LLM rewrites the narratives and
the base draws the result. Prints one table and writes results.json. "unheard" trains two variants
only, with the LLM's term and without it. A repeated command trains only what is not finished.
"""
import argparse
import dataclasses
from pathlib import Path

import torch.nn as nn

import common
import sur_adapter
import toy.narratives
from sur_adapter import PRESETS, Adapter, Config
from toy.narratives import KINDS
from uvit_fusion import softmax_attention


# ----------------------------------------------------------------------------------- the adapters
class AsReleased(Adapter):
    """The adapter of the released code, whose noise loss gives it no gradient: see ABLATIONS."""
    def __init__(self, cfg, dim):
        super().__init__(cfg, dim)
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
    "as_released": {"eta": 0.1, "noise_weight": 0.0, "texts": 0, "llm_student": "h",
                    "llm_projection": "random"},
    "paper_w": {"residual": "x"},
    "no_llm": {"llm_weight": 0.0},
    "no_prompt": {"prompt_weight": 0.0},
    "no_noise": {"noise_weight": 0.0},
    "no_texts": {"texts": 0},
    "llm_teaches_h": {"llm_student": "h"},
    "random_p": {"llm_projection": "random"},
}
ADAPTERS = {"as_released": AsReleased}
# the main figures have a second, shorter name
SHORT_NAMES = {"narrative": "as_intended_narrative", "unheard": "as_intended_unheard",
               "unheard_without_llm": "no_llm_unheard", "rewriting": "rewriting_narrative"}


# ------------------------------------------------------------------------------- the comparison
def grade(pipeline, data, args, kinds=KINDS, rewrite=None):
    """{kind: % of held-out scenes all right, kind_ci: ...} of each kind of prompt."""
    _, tables = toy.narratives.grade(
        pipeline, data, args.samples, args.sample_steps, kinds, rewrite)
    figures = {}
    for kind, table in tables.items():
        figures |= common.percent(kind, table["all"])
    return figures


def compare(args):
    cfg = common.make_config(Config, PRESETS, args)
    folder = Path(args.out or f"runs/sur_{args.action}")
    base, data, llm, cfg = sur_adapter.prepare(cfg, args)
    dataset, texts = sur_adapter.load_triples(base, Path(data) / "train2017")
    results = {"base": grade(base, data, args)}
    rewriter = toy.narratives.Rewriter(cfg.llm, base.device)
    results["rewriting"] = grade(base, data, args, ("narrative", "unheard"), rewriter)
    names = ("as_intended", "no_llm") if args.action == "unheard" else ABLATIONS
    args.resume = not args.overwrite                  # what is finished is not trained again
    for name in names:
        print(f"\n{name}, into {folder / name}/")
        variant = dataclasses.replace(cfg, **ABLATIONS[name])
        adapter_class = ADAPTERS.get(name, Adapter)
        pipeline = sur_adapter.train(
            variant, base, llm, dataset, texts, folder / name, args, adapter_class)
        results[name] = grade(pipeline, data, args)
        common.write_results(folder / name, results[name])

    rows = [["all right, %", "plain", "+-", "narratives", "+-", "unheard words", "+-"]]
    figures = {}
    for name, result in results.items():
        row = [name]
        for kind in KINDS:                            # the LLM rewrites no plain captions
            row += [result.get(kind, ""), result.get(f"{kind}_ci", "")]
        rows.append(row)
        figures |= {f"{name}_{kind}": value for kind, value in result.items()}
    for short, name in SHORT_NAMES.items():
        figures[short] = figures[name]
        figures[f"{short}_ci"] = figures[f"{name}_ci"]
    common.write_results(folder, figures)
    common.print_table(rows, f"{folder}: {args.samples} held-out scenes, {cfg.steps} steps of "
                       f"training, {args.sample_steps} of sampling")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["compare", "unheard"])
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10,
                        help="sampling steps per graded image (default %(default)s)")
    common.add_training_flags(parser, "folder of the runs (default runs/sur_<action>)")
    common.add_config_flags(parser, Config, PRESETS)
    compare(parser.parse_args())


if __name__ == "__main__":
    common.entry(main)
