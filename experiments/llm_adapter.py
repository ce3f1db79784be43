"""An LLM as the text encoder: what each part of the adapter gives, and what its first stage.

    python -m experiments.llm_adapter compare --steps-1 600 --steps-2 300 --samples 512

Trains each variant in stage 1 alone, on the same texts in the same order; "no_stage_1" in stage 2
alone. Grades it on held-out scenes: in four languages taking turns, as paragraphs, and in English.
Prints one table and writes results.json into runs/llm_compare. A variant that is finished is kept,
so the command can be given again.
"""
import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import llm_adapter
from common import UserError
from llm_adapter import PRESETS, Adapter, Config
from toy import judge, language, multilingual
from toy.language import LANGUAGES


# ------------------------------------------------------------------------------------ the adapters
class UnmaskedAdapter(Adapter):
    """Attends to the padding of the LLM's tokens, as the released code does in stage 1."""
    def forward(self, h, mask):
        return super().forward(h, torch.ones_like(mask))


class MLPAdapter(Adapter):
    """Each token by itself: token i of y is made of token i of the LLM; no attention, no conv."""
    def forward(self, h, mask):
        length = self.queries.shape[1]
        missing = max(0, length - h.shape[1])
        h = F.pad(h, (0, 0, 0, missing))[:, :length]                        # (B, L, llm_dim)
        mask = F.pad(mask, (0, missing))[:, :length]                        # (B, L)
        r = self.norm(self.mlp(self.norm_in(h)))
        y = self.mean + self.std * self.out(r).float()
        p = 20 * mask.float() - 10              # 10 or -10: as many tokens as the LLM has
        return y, p


# --------------------------------------------------------------------------------- what they read
def shuffle_embeddings(cfg, llm):
    """Each token gets the embedding of another: as random ones, of the LLM's own size."""
    table = llm.model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(table), generator=generator).to(table.device)
    table.copy_(table[order])
    return llm


class LayersSideBySide:
    """Several layers of an LLM, each normalised, as one state: (B, n, layers x llm_dim)."""
    def __init__(self, encoders):
        self.encoders = encoders
        self.device = encoders[0].device
        self.dim = sum(encoder.dim for encoder in encoders)

    def __call__(self, texts):
        states = []
        for encoder in self.encoders:
            h, mask = encoder(texts)
            states.append(F.layer_norm(h, h.shape[-1:]))
        return torch.cat(states, dim=-1), mask


def embeddings_and_last(cfg, llm):
    last = common.LLMEncoder(cfg.llm, -1, cfg.instruction, llm.device, llm.model.dtype)
    return LayersSideBySide([llm, last])


# the settings that each variant changes
ABLATIONS = {
    "adapter": {},                              # reads the embeddings, layer 0
    "random_embeddings": {},
    "layer_first": {"llm_layer": 1},
    "layer_middle": {"llm_layer": 2},
    "layer_last": {"llm_layer": -1},
    "embeddings_and_last": {},
    "no_mask": {},
    "no_window": {"conv_kernel": 1},            # a token's neighbours do not reach it
    "mlp": {},
    "mlp_last": {"llm_layer": -1},
    "no_stage_1": {},
}
ADAPTERS = {"no_mask": UnmaskedAdapter, "mlp": MLPAdapter, "mlp_last": MLPAdapter}
LLMS = {"random_embeddings": shuffle_embeddings, "embeddings_and_last": embeddings_and_last}
KINDS = ("turns", "long", "english")            # of prompts, see toy.multilingual


# ---------------------------------------------------------------------------------- the comparison
def run_variant(name, cfg, folder, args):
    """Trains and grades a variant, or reads the figures of one that is finished."""
    base, data, llm, cfg = llm_adapter.prepare(cfg, args)
    if name in LLMS:
        llm = LLMS[name](cfg, llm)
        cfg.llm_identity = name                 # no run that sample.py could load with cfg.llm
    stage = 2 if name == "no_stage_1" else 1
    if (folder / "results.json").exists() and not args.overwrite:
        if common.read_config(Config, folder) != llm_adapter.stage_config(cfg, stage):
            raise UserError(f"{folder}/ was made with other settings: give the same ones, "
                            "--overwrite, or another --out")
        return common.read_json(folder / "results.json")
    print(f"\n{name}, into {folder}/")
    run_args = argparse.Namespace(resume=not args.overwrite, overwrite=args.overwrite)
    adapter_class = ADAPTERS.get(name, Adapter)
    pipeline = llm_adapter.train(cfg, base, llm, data, folder, run_args, [stage], adapter_class)
    figures = {}
    for kind in KINDS:
        _, right = multilingual.grade(pipeline, kind, data, args.samples, args.sample_steps)
        figures |= common.percent(kind, right)
    common.write_results(folder, figures)
    return figures


def compare(args):
    cfg = common.make_config(Config, PRESETS, args)
    folder = Path(args.out or "runs/llm_compare")
    rows = [["all right, %", "four languages", "+-", "long", "english"]]
    figures = {}
    for name, change in ABLATIONS.items():
        variant = dataclasses.replace(cfg, **change)
        result = run_variant(name, variant, folder / name, args)
        figures[name] = result["turns"]
        figures[f"{name}_ci"] = result["turns_ci"]
        figures[f"{name}_long"] = result["long"]
        figures[f"{name}_english"] = result["english"]
        rows.append([name, result["turns"], result["turns_ci"], result["long"], result["english"]])
    common.write_results(folder, figures)
    common.print_table(rows, f"{folder}: {args.samples} held-out scenes; {cfg.steps_1} steps of "
                       f"stage 1 alone, no_stage_1: {cfg.steps_2} of stage 2 alone")


# ------------------------------------------------------------------------------ what a layer tells
def own_token(states, ids):
    """Which tokens a linear map of their states names, of the second half; the first half fits it.

    states (N, D), ids (N,) -> bool (N / 2,). By ridge regression.
    """
    x = F.pad(F.layer_norm(states, states.shape[-1:]), (0, 1), value=1.0)            # (N, D + 1)
    y = F.one_hot(ids).float()
    half = len(x) // 2
    gram = x[:half].T @ x[:half] + torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, x[:half].T @ y[:half])
    return (x[half:] @ weight).argmax(1) == ids[half:]


def nearest(states, mask, other_states, other_mask):
    """For each text the number of the nearest other one, by the cosine of their mean states."""
    means = []
    for h, h_mask in ((states, mask), (other_states, other_mask)):
        h = F.layer_norm(h, h.shape[-1:]) * h_mask[..., None]
        mean = h.sum(1) / h_mask.sum(1, keepdim=True)                                # (B, D)
        means.append(F.normalize(mean - mean.mean(0), dim=1))
    return (means[0] @ means[1].T).argmax(1)


def probe(args):
    """A table of what the states of each layer tell of their own token, and of other languages."""
    cfg = common.make_config(Config, PRESETS, args)
    _, data, llm, cfg = llm_adapter.prepare(cfg, args)
    scenes, _, _ = judge.validation_scenes(data, args.samples)
    prompts = multilingual.validation_prompts(scenes, [language.plain(scene) for scene in scenes])
    rows = [["layer", "own token, %", "+-", *LANGUAGES[1:]]]
    figures = {}
    for layer in range(llm.model.config.num_hidden_layers + 1):
        llm.layer = layer
        states, mask = llm(prompts["turns"])
        mask[:, 0] = False                                            # start says nothing
        tokens = llm.tokenizer(prompts["turns"]).input_ids
        ids = torch.tensor([i for row in tokens for i in row[1:llm.length]])
        figures |= common.percent(f"layer{layer}_token", own_token(states[mask], ids).numpy())
        row = [layer, figures[f"layer{layer}_token"], figures[f"layer{layer}_token_ci"]]
        english = llm(prompts["english"])
        for name in LANGUAGES[1:]:
            found = nearest(*llm(prompts[name]), *english).tolist()
            right = [prompts["english"][i] == prompts["english"][j] for i, j in enumerate(found)]
            figures |= common.percent(f"layer{layer}_{name}", right)
            row.append(figures[f"layer{layer}_{name}"])
        rows.append(row)
    common.write_results(Path(args.out or "runs/llm_probe"), figures)
    common.print_table(rows, f"{args.samples} held-out scenes: tokens named by a linear map of "
                       "their states, and texts whose mean state is nearest the English of the "
                       "same scene")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["compare", "probe"])
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10,
                        help="sampling steps of a graded image (default %(default)s)")
    common.add_training_flags(parser, "folder of the runs (default runs/llm_compare)")
    common.add_config_flags(parser, Config, PRESETS)
    args = parser.parse_args()
    if args.action == "compare":
        compare(args)
    else:
        probe(args)


if __name__ == "__main__":
    common.entry(main)
