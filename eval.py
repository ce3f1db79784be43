"""Measures any checkpoint: exact alignment on the toy world; the cost of early and intermediate fusion; the rank of attention to text.

    python eval.py                                       # held-out captions drawn by runs/uvit_fusion and graded by the exact judge
    python eval.py --run runs/uvit_fusion/early.safetensors --samples 512
    python eval.py --cost                                # parameters, GFLOPs and milliseconds, at the sizes "toy" and "coco", side by side

The table is printed and its figures are written to results.json in the run folder (`--cost`: runs/cost/).
"""
import argparse
import dataclasses
import itertools
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import common
import toy
import uvit_fusion
from common import UserError

# -------------------------------------------------------------------------------------------------------------- alignment
ROWS = {"all": "all fields", "all_unseen": "  with an unseen triple", "count": "count", "colour": "colour", "shape": "shape", "relation": "relation"}


def interval(values):
    """Half-width of the 95 % interval of the mean of independent values, in their unit; nan are left out."""
    values = np.asarray(values)[~np.isnan(values)]
    return 1.96 * values.std() / max(1, len(values))**0.5


def validation_prompts(data, size, samples):
    """The first `samples` validation scenes and one caption of each, the same for every run: (scenes, captions, unseen flags)."""
    from toy.shapes import Scene
    dataset = common.CaptionedImages(data, "val", size)
    if "scene" not in dataset.items[0][2]:
        raise UserError(f"--data {data}: its annotations hold no scenes, so there is nothing to grade exactly; use --data shapes")
    items = dataset.items[:samples]
    captions = [random.Random(i).choice(texts) for i, (_, texts, _) in enumerate(items)]
    return [Scene.from_json(image["scene"]) for _, _, image in items], captions, [image["unseen"] for _, _, image in items]


def alignment(painter, data, samples=2048, sampling=None, batch=256, progress=True):
    """Draws held-out captions, picture i from noise i, and has them judged.

    Returns (figures, table): figures in % are all, all_ci, all_unseen, count, colour, shape and relation, with samples; table holds for
    each the verdicts, an array of 0 and 1 with a row a caption, nan where a field does not apply (relation: scenes of one group).
    """
    from toy.shapes import FIELDS, judge, parse
    scenes, captions, unseen = validation_prompts(data, painter.settings.size, samples)
    pictures = painter.draw(captions, **sampling or {}, batch=batch, progress=progress)
    judged = [judge(things, scene) for things, scene in zip(parse(pictures), scenes)]
    table = {field: np.array([verdict[field] for verdict in judged], float) for field in FIELDS}
    table["relation"][[scene.relation is None for scene in scenes]] = np.nan
    table["all_unseen"] = np.where(unseen, table["all"], np.nan)
    figures = {name: 100 * float(np.nanmean(table[name])) for name in ROWS}
    return figures | {"all_ci": 100 * float(interval(table["all"])), "samples": len(scenes)}, table


def alignment_rows(figures, table):
    """The figures as rows of a table, each with its interval."""
    return [["held-out captions", "right, %", "+-"], *([label, figures[name], 100 * interval(table[name])] for name, label in ROWS.items())]


# -------------------------------------------------------------------------------------------------------------------- cost
def help_seconds(script):
    """How long `--help` of a script takes."""
    begin = time.time()
    subprocess.run([sys.executable, script, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.time() - begin


def forward_flops(settings):
    """Floating-point operations of one forward pass at batch 1, a multiply-add counted as two."""
    from torch.utils.flop_counter import FlopCounterMode
    model, (x, t, text, mask) = uvit_fusion.UViT(settings), random_inputs(settings, 1, "cpu")
    # the fused kernel is not counted on CPUs; in bf16 the network takes the plain softmax there
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x, t, text, mask)
    return counter.get_total_flops()


def random_inputs(s, batch, device):
    g = torch.Generator().manual_seed(0)
    text, lengths = torch.randn(batch, s.text_length, s.text_dim, generator=g), torch.randint(8, s.text_length, (batch, 1), generator=g)
    inputs = (torch.randn(batch, s.channels, s.size, s.size, generator=g), torch.randint(1, 1001, (batch,), generator=g), text,
              torch.arange(s.text_length) < lengths)
    return [value.to(device) for value in inputs]


def step_costs(variants, device, precision, batch=None, rounds=10):
    """What a training step and a drawn picture cost: {name: {parameters, gflops, ms, sample_ms, batch}}.

    variants: {name: Settings}. A step is forward, backward and optimiser on random inputs, text encoder not included. The variants take
    turns and the median over `rounds` counts, so that a passing load hits all alike. sample_ms: a picture in 25 guided steps.
    """
    costs, runs = {}, {}
    for name, s in variants.items():
        torch.manual_seed(0)
        model, size = uvit_fusion.UViT(s).to(device), batch or s.batch
        costs[name] = {"parameters": sum(p.numel() for p in model.parameters()), "gflops": forward_flops(s) / 1e9, "batch": size}
        few = random_inputs(s, max(1, size // 8), device)
        runs[name] = (model, uvit_fusion.make_optimizers(model, s), random_inputs(s, size, device), few, [], [])
    for n in range(rounds + 2):
        for name, (model, optimizers, (x, t, text, mask), few, times, draws) in runs.items():
            common.synchronize(device)
            begin = time.perf_counter()
            with common.autocast(device, precision):
                loss = (model(x, t, text, mask).float() - x).square().mean()
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            common.synchronize(device)
            times.append(time.perf_counter() - begin)
            if n % 4 == 2:
                s, (x, t, text, mask) = variants[name], few
                begin = time.perf_counter()
                with torch.no_grad(), common.autocast(device, precision):
                    network = uvit_fusion.guided(model, text, mask, text[:1], mask[:1], 3.0)
                    uvit_fusion.Diffusion(s.schedule, s.target).sample(network, x, 25)
                common.synchronize(device)
                draws.append((time.perf_counter() - begin) / len(x))
    for name, (*_, times, draws) in runs.items():
        costs[name] |= {"ms": 1e3 * float(np.median(times[2:])), "sample_ms": 1e3 * float(np.median(draws))}
    return costs


def cost(device, precision, batch, folder="runs/cost"):
    """Early against intermediate fusion at both sizes, and a table over v and c at the paper's size."""
    peak = common.matmul_rate(device, precision, 4096, seconds=3)
    print(f"measured matrix-product peak of {common.machine()} in {str(precision)[6:]}: {peak / 1e12:.2f} TFLOP/s")
    figures = {"peak_tflops": peak / 1e12}
    for preset, v, c, prefix in (("toy", 2, 2, "toy_"), ("coco", 5, 1, "")):
        base = uvit_fusion.Settings(**uvit_fusion.PRESETS[preset])
        size = base.batch if preset == "toy" or device.type == "cuda" else batch
        sweep = {"early": (0, 0, "concat"), "intermediate": (v, c, "concat")}
        if preset == "coco":
            sweep |= {f"v{v} c{c}": (v, c, "concat") for v, c in ((3, 3), (4, 1), (6, 2))}
            sweep |= {"cross, early": (0, 0, "cross"), "cross, v3 c3": (3, 3, "cross"), "cross, v3 c1": (3, 1, "cross")}
        variants = {name: dataclasses.replace(base, image_blocks=v, caption_blocks=c, fusion=f) for name, (v, c, f) in sweep.items()}
        costs = step_costs(variants, device, precision, size, rounds=40 if preset == "toy" else 8)
        early = costs["early"]
        rows = [["", "v", "c", "M parameters", "GFLOPs", "saved, %", "ms a step", "speed-up", "% of peak", "ms a picture"]]
        for name, got in costs.items():
            saved, faster = 100 * (1 - got["gflops"] / early["gflops"]), early["ms"] / got["ms"]
            mfu = 100 * 3 * got["gflops"] * 1e9 * size / (got["ms"] / 1e3) / peak                      # backward costs twice a forward
            rows.append([name, *sweep[name][:2], f"{got['parameters'] / 1e6:.2f}", f"{got['gflops']:.3f}", saved, got["ms"], f"{faster:.2f}",
                         mfu, got["sample_ms"]])
            if name in ("early", "intermediate"):
                figures |= {f"{prefix}{name}_{what}": got[what] for what in ("gflops", "ms", "sample_ms")}
            if name == "intermediate":
                figures |= {f"{prefix}v": v, f"{prefix}c": c, f"{prefix}flops_saved_percent": saved, f"{prefix}step_speedup": faster,
                            f"{prefix}mfu_percent": mfu}
        common.print_table(rows, f"preset {preset}, training batch {size}; a picture: 25 guided steps")
    Path(folder).mkdir(parents=True, exist_ok=True)
    common.write_results(folder, figures)


# ----------------------------------------------------------------------------------------------------- the paper's comparison
T_95 = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}     # Student's t, 97.5 %, for the mean of so many values


def compare(s, data, folder, device, precision, seeds, samples):
    """The paper's experiment in small: four variants, same data, steps and seeds (cross-attention: one seed), one table, one picture.

    A run that is finished is kept and an interrupted one goes on, so the command can be given again. Intervals are over seeds.
    """
    validation_prompts(data, s.size, 1)                              # refuses data that cannot be graded before anything is trained
    folder, right, painters = Path(folder), {name: [] for name in uvit_fusion.VARIANTS}, {}
    for seed, (name, change) in itertools.product(range(seeds), uvit_fusion.VARIANTS.items()):
        if seed and change["fusion"] == "cross":
            continue
        run, settings = folder / f"{name}-{seed}", dataclasses.replace(s, seed=seed, **change)
        verdict = run / "compared.json"                              # not results.json, which eval.py writes with any flags
        if verdict.exists():
            common.check_settings(run, settings)
        else:
            print(f"\n{name}, seed {seed}: into {run}/")
            painter = uvit_fusion.train(settings, data, run, device, precision, resume=(run / "state.pt").exists(), overwrite=True)
            figures, table = alignment(painter, data, samples)
            common.print_table(alignment_rows(figures, table))
            common.write_results(run, figures)
            common.write_json(verdict, figures)
        right[name].append(common.read_json(verdict))
        if not seed:
            painters[name] = uvit_fusion.load(run, device, precision)

    def mean_and_interval(values):
        spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
        return float(np.mean(values)), float(T_95.get(len(values), 2.571) * spread / len(values)**0.5)     # six or more: t of six, a little wide
    cost = step_costs({name: painter.settings for name, painter in painters.items()}, device, precision)
    rows, figures = [["", "all right, %", "+-", "unseen", "count", "relation", "GFLOPs", "ms a step", "seeds"]], {}
    for name, runs in right.items():
        mean, half = mean_and_interval([run["all"] for run in runs])
        figures |= {f"{name}_all": mean, f"{name}_all_ci": half, f"{name}_gflops": cost[name]["gflops"], f"{name}_ms": cost[name]["ms"]}
        rows.append([name, mean, half, *(np.mean([run[f] for run in runs]) for f in ("all_unseen", "count", "relation")),
                     f"{cost[name]['gflops']:.3f}", cost[name]["ms"], len(runs)])
    common.print_table(rows, f"Fusion variants after {s.steps} steps, {right['early'][0]['samples']} held-out captions each; intervals over seeds")
    difference = [b["all"] - a["all"] for a, b in zip(right["early"], right["intermediate"])]
    figures["difference"], figures["difference_ci"] = mean_and_interval(difference)
    print(f"intermediate - early, concatenation: {figures['difference']:+.1f} +- {figures['difference_ci']:.1f} points over {len(difference)} seeds")
    common.write_results(folder, {name: value for name, value in figures.items() if not math.isnan(value)})
    scenes, captions, _ = validation_prompts(data, s.size, 8)
    pictures = np.concatenate([painter.draw(captions) for painter in painters.values()])
    texts = [""] * len(captions) * (len(painters) - 1) + captions
    common.picture_grid(pictures, texts, folder / "samples" / "variants.png", columns=len(captions), titles=list(painters))
    print(f"the same captions and noise, a row a variant: {folder / 'samples' / 'variants.png'}")


# --------------------------------------------------------------------------------------------- rank of text-to-image attention
def effective_rank(matrices):
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): (..., Q, K) -> (...), from 1 to min(Q, K)."""
    values = torch.linalg.svdvals(matrices.cpu().double())                     # some GPUs have no float64
    p = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return (-(p * p.clamp(min=1e-12).log()).sum(-1)).exp()


@torch.no_grad()
def analyse(painter, data, folder, samples=64):
    """The attention of image tokens to text tokens, block by block: its effective rank and its share of all attention.

    Rows of the matrix A (N, L) of a head are patches, columns the caption's real tokens, entries the softmax over all keys. Averaged
    over heads, validation pictures and five noise levels. A rank of 1 means that every patch looks at the caption in the same way.
    The measure is this project's own: the paper's code for its analysis was not released.
    """
    s, model, device = painter.settings, painter.model, painter.device
    dataset = common.CaptionedImages(data, "val", s.size)
    pictures = torch.stack([dataset.picture(i) for i in range(min(samples, len(dataset)))]).to(device)
    text, mask = painter.encoder([texts[0] for _, texts, _ in dataset.items[:len(pictures)]])
    x_0, patches = common.to_float(pictures), (s.size // s.patch)**2
    names = [*(f"in {i}" for i in range(s.depth // 2)), "middle", *(f"out {i}" for i in range(s.depth // 2))]
    ranks, shares = {name: [] for name in names}, {name: [] for name in names}
    for t in (100, 300, 500, 700, 900):
        record = []
        step = torch.full((len(x_0),), t, device=device)
        eps = torch.randn(x_0.shape, generator=torch.Generator(device).manual_seed(t), device=device)
        model(painter.diffusion.q_sample(x_0, step, eps), step, text, mask, record)
        for name, logits in zip(names, record):
            keys = logits.shape[-1]
            if keys == 1 + patches:
                continue                                                       # a block without text
            first = 1 + patches if s.fusion == "cross" else 1                  # where text begins among the keys
            a = logits.softmax(-1)[:, :, -patches:, first:first + s.text_length]                                   # (B, H, N, L)
            for i, real in enumerate(mask.sum(1).tolist()):
                ranks[name].append(effective_rank(a[i, :, :, :real]).mean().item())
                shares[name].append(a[i].sum(-1).mean().item())
    rows = [["block", "effective rank", "+-", "share of attention, %"]]
    for name in names:
        if ranks[name]:
            rows.append([name, f"{np.mean(ranks[name]):.2f}", f"{interval(ranks[name]):.2f}", 100 * np.mean(shares[name])])
        else:
            rows.append([name, "no text", "", ""])
    common.print_table(rows, f"Text-to-image attention of {painter.settings.fusion}, v = {s.image_blocks}, c = {s.caption_blocks}; "
                             f"the rank could be {mask.sum(1).float().mean():.1f}, the mean number of tokens")
    curve = [(i, float(np.mean(ranks[name]))) for i, name in enumerate(names) if ranks[name]]
    share = [(i, 10 * float(np.mean(shares[name]))) for i, name in enumerate(names) if shares[name]]
    common.plot({"effective rank": curve, "share of attention x 10": share}, folder / "attention_rank.png", "block", "text-to-image attention")
    print(f"as a picture: {folder / 'attention_rank.png'}")


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/uvit_fusion", help="run folder, or a .safetensors file in one (default %(default)s)")
    parser.add_argument("--data", help="data to take the captions from (default: what the run was trained on)")
    parser.add_argument("--samples", type=common.positive, default=2048, help="held-out captions to draw and grade (default %(default)s)")
    parser.add_argument("--cost", action="store_true", help="measure what early and intermediate fusion cost, instead")
    parser.add_argument("--batch", type=common.positive, default=8, help="--cost: training batch at the size coco on a CPU (default %(default)s)")
    common.add_sampling_flags(parser)
    args = parser.parse_args()
    if args.cost:
        device = common.pick_device(args.device)
        cost(device, common.pick_precision(args.precision, device), args.batch)
        return
    painter = common.load_run(args.run, args.device, args.precision)
    data = toy.prepare(args.data or painter.settings.data, painter.settings.clip, painter.settings.size)
    figures, table = alignment(painter, data, args.samples, common.sampling(args))
    common.print_table(alignment_rows(figures, table), f"{args.run}: {figures['samples']} held-out captions, {args.sample_steps} steps of "
                                                       f"{args.sampler}, guidance {args.guidance:g}")
    if Path(args.run).suffix != ".safetensors":
        common.write_results(args.run, figures)


if __name__ == "__main__":
    common.entry(main)
