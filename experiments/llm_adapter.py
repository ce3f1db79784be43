"""An LLM as the text encoder: what each part adds, and what the layers of the LLM know.

    python -m experiments.llm_adapter compare --base runs/deep --steps-1 600 --steps-2 300 \
        --samples 512
    python -m experiments.llm_adapter probe --samples 2048 --precision fp32
    python -m experiments.llm_adapter unseen-languages --run runs/llm_adapter --samples 512

`compare` trains each variant in stage 1 alone, on the same texts in the same order; "no_stage_1" in
stage 2 alone. It grades them on held-out scenes: in four languages taking turns, as paragraphs, and
in English. Repeated, it trains only what is not finished. `probe` trains no adapter: linear maps
show what the states of a layer know. `unseen-languages` grades a trained run on captions in
languages that no training pair has, which only a large LLM knows. Each prints a table and writes
results.json.
"""
import argparse
import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import encoders
import llm_adapter
import sample
import toy
from llm_adapter import PRESETS, Adapter, Config
from toy import judge, language, multilingual
from toy.shapes import COLOURS


# ------------------------------------------------------------------------------------ the adapters
class UnmaskedAdapter(Adapter):
    """Attends to the padding of the LLM's tokens, as the released code does in stage 1."""
    def forward(self, h, mask):
        return super().forward(h, torch.ones_like(mask))


class MLPAdapter(Adapter):
    """Each token by itself: token i of y is made from token i of the LLM; no attention, no conv."""
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
    """Each token gets another's embedding: like random ones, but of the LLM's own size."""
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
    """`llm`, which reads the embeddings, side by side with the last layer."""
    last = encoders.LLMEncoder(cfg.llm, -1, cfg.instruction, llm.device, llm.model.dtype)
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
    "no_window": {"conv_kernel": 1},            # the convolution sees one token
    "mlp": {},
    "mlp_last": {"llm_layer": -1},
    "no_stage_1": {},
}
ADAPTERS = {"no_mask": UnmaskedAdapter, "mlp": MLPAdapter, "mlp_last": MLPAdapter}
LLMS = {"random_embeddings": shuffle_embeddings, "embeddings_and_last": embeddings_and_last}


# ---------------------------------------------------------------------------------- the comparison
def run_variant(name, cfg, folder, args):
    """Trains and grades a variant: {kind of prompt: % right, kind_ci: ...}."""
    base, data, llm, cfg = llm_adapter.prepare(cfg, args)
    if name in LLMS:
        llm = LLMS[name](cfg, llm)
        cfg.llm_identity = name                 # sample.py must not load it with cfg.llm
    print(f"\n{name}, into {folder}/")
    stage = 2 if name == "no_stage_1" else 1
    adapter_class = ADAPTERS.get(name, Adapter)
    pipeline = llm_adapter.train(cfg, base, llm, data, folder, args, [stage], adapter_class)
    figures = {}
    for kind in ("turns", "long", "english"):   # see toy.multilingual
        _, right = multilingual.grade(pipeline, kind, data, args.samples, args.sample_steps)
        figures |= common.percent(kind, right)
    common.write_results(folder, figures)
    return figures


def compare(args):
    cfg = common.make_config(Config, PRESETS, args)
    folder = Path(args.out or "runs/llm_compare")
    args.resume = not args.overwrite            # what is finished is not trained again
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
def linear_map(states, labels, others):
    """The M labels of others (M, D) by ridge regression from states (N, D) to labels (N,)."""
    x = F.pad(F.layer_norm(states, states.shape[-1:]), (0, 1), value=1.0)            # (N, D + 1)
    y = F.one_hot(labels).float()
    weight = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y)
    others = F.pad(F.layer_norm(others, others.shape[-1:]), (0, 1), value=1.0)       # (M, D + 1)
    return (others @ weight).argmax(1)


def own_token(llm, texts):
    """Which tokens of the second half of the texts a linear map of their states names, (N,)."""
    half = len(texts) // 2
    states = []
    ids = []
    for part in (texts[:half], texts[half:]):
        h, mask = llm(part)
        mask[:, 0] = False                                        # the start says nothing
        states.append(h[mask].cpu())                                                 # (N, D)
        tokens = llm.tokenizer(part).input_ids
        ids.append(torch.tensor([i for row in tokens for i in row[1:llm.length]]))
    return linear_map(states[0], ids[0], states[1]) == ids[1]


def same_scene(llm, texts, english):
    """For which texts the nearest English one, by the cosine of mean states, is its own, (N,)."""
    means = []
    for part in (texts, english):
        h, mask = llm(part)
        h = F.layer_norm(h, h.shape[-1:]) * mask[..., None]
        mean = h.sum(1) / mask.sum(1, keepdim=True)                                  # (N, D)
        means.append(F.normalize(mean - mean.mean(0), dim=1))
    nearest = (means[0] @ means[1].T).argmax(1).tolist()
    return np.array([english[i] == english[j] for i, j in enumerate(nearest)])


def narrative_colour(llm, scenes, captions, question):
    """In which narratives a linear map, fitted to captions, names the right colour: bool (N,).

    It reads the last state. The scenes have one group each; question: is put after each text.
    """
    labels = torch.tensor([list(COLOURS).index(scene.groups[0].colour) for scene in scenes])
    narratives = [language.narrative(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    states = []
    for texts in (captions, narratives):
        h, mask = llm([text + question for text in texts])
        states.append(h[torch.arange(len(h)), mask.sum(1) - 1].cpu())                # (N, D)
    return linear_map(states[0], labels, states[1]) == labels


def probe(args):
    """A table of what the states of each layer tell, without any adapter."""
    cfg = common.make_config(Config, PRESETS, args)
    _, data, llm, cfg = llm_adapter.prepare(cfg, args)
    scenes, captions, _ = judge.validation_scenes(data, args.samples)
    prompts = multilingual.validation_prompts(scenes, [language.plain(scene) for scene in scenes])
    alone = [i for i, scene in enumerate(scenes) if scene.relation is None]      # of one group
    one_group = [scenes[i] for i in alone]
    its_captions = [captions[i] for i in alone]
    rows = [["layer", "own token", "same scene", "colour", "colour, asked", "+-"]]
    figures = {}
    for layer in range(llm.model.config.num_hidden_layers + 1):
        llm.layer = layer
        table = {
            "token": own_token(llm, prompts["turns"]),
            "scene": same_scene(llm, prompts["german"], prompts["english"]),
            "colour": narrative_colour(llm, one_group, its_captions, ""),
            "asked": narrative_colour(llm, one_group, its_captions, language.IN_PLAIN_WORDS),
        }
        for name, right in table.items():
            figures |= common.percent(f"layer{layer}_{name}", np.asarray(right))
        rows.append([layer, *(figures[f"layer{layer}_{name}"] for name in table),
                     figures[f"layer{layer}_asked_ci"]])
    common.write_results(Path(args.out or "runs/llm_probe"), figures)
    common.print_table(rows, f"% right, on {args.samples} held-out scenes, {len(alone)} of them "
                       "with one group")


# ----------------------------------------------------------------------------- unseen languages
def unseen_languages(args):
    """A table of languages that were in no training pair, by the base and with the LLM."""
    pipeline = sample.load_run(args.run, args.device, args.precision)
    folder, _ = common.run_files(args.run)
    cfg = common.read_config(Config, folder)
    base = sample.load_run(cfg.base, args.device, args.precision)
    data = toy.prepare(cfg.data, base.cfg.clip, base.image_size)
    scenes, _, unseen = judge.validation_scenes(data, args.samples)
    rows = [["all right, %", "own text encoder", "+-", "with the LLM", "+-"]]
    figures = {}
    for name in language.UNSEEN_LANGUAGES:
        prompts = [language.tell(scene, name, random.Random(i)) for i, scene in enumerate(scenes)]
        row = [name]
        for label, one in (("clip_", base), ("", pipeline)):
            images = one.generate(prompts, steps=args.sample_steps, progress=True)
            right = judge.grade_images(images, scenes, unseen)["all"]
            figures |= common.percent(label + name, right)
            row += [figures[label + name], figures[f"{label}{name}_ci"]]
        rows.append(row)
    common.print_table(rows, f"{args.run}: {args.samples} scenes, languages with no training pair")
    common.write_results(folder, figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["compare", "probe", "unseen-languages"])
    parser.add_argument("--run", default="runs/llm_adapter",
                        help="unseen-languages: the run (default %(default)s)")
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out prompts of each kind to grade (default %(default)s)")
    parser.add_argument("--sample-steps", type=common.positive, default=10,
                        help="sampling steps per graded image (default %(default)s)")
    common.add_training_flags(parser, "compare, probe: folder (default runs/llm_<action>)")
    common.add_config_flags(parser, Config, PRESETS)
    args = parser.parse_args()
    if args.action == "compare":
        compare(args)
    elif args.action == "probe":
        probe(args)
    else:
        unseen_languages(args)


if __name__ == "__main__":
    common.entry(main)
