"""Measures any checkpoint: exact alignment on the toy world; the cost of early and intermediate fusion anywhere.

    python eval.py                                       # held-out captions drawn by runs/uvit_fusion and graded by the exact judge
    python eval.py --run runs/uvit_fusion/early.safetensors --samples 512
    python eval.py --cost                                # parameters, GFLOPs and milliseconds, at the sizes "toy" and "coco", side by side

The table is printed and its figures are written to results.json in the run folder (`--cost`: runs/cost/).
"""
import argparse
import dataclasses
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
def interval(values):
    """Half-width of the 95 % interval of a mean, in the unit of the values."""
    return 1.96 * np.std(values) / max(1, len(values))**0.5


def validation_prompts(data, size, samples):
    """The first `samples` validation scenes and one caption of each, the same for every run: (scenes, captions, unseen flags)."""
    from toy.shapes import Scene
    dataset = common.CaptionedImages(data, "val", size)
    if "scene" not in dataset.items[0][2]:
        raise UserError(f"--data {data}: its annotations hold no scenes, so there is nothing to grade exactly; use --data shapes")
    items = dataset.items[:samples]
    captions = [random.Random(i).choice(texts) for i, (_, texts, _) in enumerate(items)]
    return [Scene.from_json(image["scene"]) for _, _, image in items], captions, [image["unseen"] for _, _, image in items]


def verdicts(painter, scenes, captions, sampling, batch=256, progress=True):
    """Draws each caption (sample i from noise i) and judges it: {field: array of 0 and 1}; `relation` is nan for scenes without one."""
    from toy.shapes import FIELDS, judge, parse
    pictures = painter.draw(captions, **sampling, batch=batch, progress=progress)
    judged = [judge(things, scene) for things, scene in zip(parse(pictures), scenes)]
    table = {field: np.array([verdict[field] for verdict in judged], float) for field in FIELDS}
    table["relation"][[scene.relation is None for scene in scenes]] = np.nan
    return table


def alignment(painter, data, samples=2048, sampling=None, batch=256, progress=True):
    """The figures of the exact judge over held-out captions, in %: all, all_ci, all_unseen, count, colour, shape, relation, samples."""
    scenes, captions, unseen = validation_prompts(data, painter.settings.size, samples)
    table = verdicts(painter, scenes, captions, sampling or {}, batch, progress)
    figures = {"all": 100 * table["all"].mean(), "all_ci": 100 * interval(table["all"]),
               "all_unseen": 100 * table["all"][np.array(unseen)].mean() if any(unseen) else float("nan")}
    figures |= {field: 100 * np.nanmean(table[field]) for field in ("count", "colour", "shape", "relation")}
    return {name: float(value) for name, value in figures.items()} | {"samples": len(scenes)}, table


def alignment_rows(figures, table):
    """The same as rows of a table, each with its interval."""
    rows = [["held-out captions", "right, %", "+-"]]
    for name, label in (("all", "all fields"), ("count", "count"), ("colour", "colour"), ("shape", "shape"), ("relation", "relation")):
        values = table[name][~np.isnan(table[name])]
        rows.append([label, figures[name], 100 * interval(values)])
    rows.insert(2, ["  unseen triples", figures["all_unseen"], 100 * interval(table["all"]) * 2**0.5])
    return rows


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
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, text, mask)                                # on the CPU, so by the plain softmax: the fused kernel is not counted there
    return counter.get_total_flops()


def random_inputs(s, batch, device):
    g = torch.Generator().manual_seed(0)
    text, lengths = torch.randn(batch, s.text_length, s.text_dim, generator=g), torch.randint(8, s.text_length, (batch, 1), generator=g)
    inputs = (torch.randn(batch, s.channels, s.size, s.size, generator=g), torch.randint(1, 1001, (batch,), generator=g), text,
              torch.arange(s.text_length) < lengths)
    return [value.to(device) for value in inputs]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_costs(variants, device, precision, batch=None, rounds=10):
    """What a training step and a drawn picture cost: {name: {parameters, gflops, ms, sample_ms, batch}}.

    variants: {name: Settings}. A step is forward, backward and AdamW on random inputs, text encoder not included. The variants take turns
    and the median over `rounds` counts, so that a passing load hits all alike. sample_ms: a picture in 25 guided steps, in a batch of 8.
    """
    costs, runs = {}, {}
    for name, s in variants.items():
        torch.manual_seed(0)
        model, size = uvit_fusion.UViT(s).to(device), batch or s.batch
        costs[name] = {"parameters": sum(p.numel() for p in model.parameters()), "gflops": forward_flops(s) / 1e9, "batch": size}
        runs[name] = (model, torch.optim.AdamW(model.parameters(), fused=True), random_inputs(s, size, device), random_inputs(s, 8, device), [], [])
    for n in range(rounds + 2):
        for name, (model, optimizer, (x, t, text, mask), few, times, draws) in runs.items():
            synchronize(device)
            begin = time.perf_counter()
            with common.autocast(device, precision):
                loss = (model(x, t, text, mask).float() - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            synchronize(device)
            times.append(time.perf_counter() - begin)
            if n % 4 == 2:
                s, (x, t, text, mask) = variants[name], few
                begin = time.perf_counter()
                with torch.no_grad(), common.autocast(device, precision):
                    network = uvit_fusion.guided(model, text, mask, text[:1], mask[:1], 3.0)
                    uvit_fusion.Diffusion(s.schedule, s.target).sample(network, x, 25)
                synchronize(device)
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


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/uvit_fusion", help="run folder, or a .safetensors file in one (default %(default)s)")
    parser.add_argument("--data", help="data to take the captions from (default: what the run was trained on)")
    parser.add_argument("--samples", type=int, default=2048, help="held-out captions to draw and grade (default %(default)s)")
    parser.add_argument("--cost", action="store_true", help="measure what early and intermediate fusion cost, instead")
    parser.add_argument("--batch", type=int, default=8, help="--cost: training batch at the size coco on a CPU (default %(default)s)")
    common.add_sampling_flags(parser)
    args = parser.parse_args()
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    if args.cost:
        cost(device, precision, args.batch)
        return
    painter = common.load_run(args.run, device, precision)
    data = toy.prepare(args.data or painter.settings.data, painter.settings.clip, painter.settings.size)
    figures, table = alignment(painter, data, args.samples, common.sampling(args))
    common.print_table(alignment_rows(figures, table), f"{args.run}: {figures['samples']} held-out captions, {args.sample_steps} steps of "
                                                       f"{args.sampler}, guidance {args.guidance:g}")
    if Path(args.run).suffix != ".safetensors":
        common.write_results(args.run, figures)


if __name__ == "__main__":
    common.entry(main)
