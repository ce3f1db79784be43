"""Early against intermediate fusion: alignment, cost, attention to text, sampling steps.

    python -m experiments.fusion compare --preset deep --steps 2000    # variants, same seeds
    python -m experiments.fusion cost        # parameters, FLOPs, ms a step and an image, two sizes
    python -m experiments.fusion analyse     # the rank of text-to-image attention, block by block
    python -m experiments.fusion steps       # accuracy against sampling steps, for three samplers

Each prints a table and writes its figures to a results.json: in runs/compare, in runs/cost, or in
the folder of the run. compare takes hours on two cores; a finished variant is kept, so the
command can be repeated (with the same --precision), with more --seeds or other --variants.
"""
import argparse
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import encoders
import sample
import toy
import uvit_fusion
from toy import judge
from toy.validation import time_until
from uvit_fusion import PRESETS, Config, Diffusion, UViT

# for preset deep; where image_blocks and caption_blocks are missing, they are those of the preset
VARIANTS = {
    "early": {"fusion": "concat", "image_blocks": 0, "caption_blocks": 0},
    "intermediate": {"fusion": "concat"},
    # controls: caption blocks alone, late joining alone, and as many parameters as intermediate
    "v0c2": {"fusion": "concat", "image_blocks": 0, "caption_blocks": 2},
    "v2c0": {"fusion": "concat", "image_blocks": 2, "caption_blocks": 0},
    "early_deeper": {"fusion": "concat", "image_blocks": 0, "caption_blocks": 0, "depth": 8},
    "early_cross": {"fusion": "cross", "image_blocks": 0, "caption_blocks": 0},
    "intermediate_cross": {"fusion": "cross"},
}
# at the paper's size, for `cost`
SWEEP = {
    "early": {"fusion": "concat", "image_blocks": 0, "caption_blocks": 0},
    "intermediate": {"fusion": "concat", "image_blocks": 5, "caption_blocks": 1},  # the docs' v5 c1
    "v3 c3": {"fusion": "concat", "image_blocks": 3, "caption_blocks": 3},         # as released
    "v4 c1": {"fusion": "concat", "image_blocks": 4, "caption_blocks": 1},
    "v6 c2": {"fusion": "concat", "image_blocks": 6, "caption_blocks": 2},
    "cross, early": {"fusion": "cross", "image_blocks": 0, "caption_blocks": 0},
    "cross, v3 c3": {"fusion": "cross", "image_blocks": 3, "caption_blocks": 3},
    "cross, v3 c1": {"fusion": "cross", "image_blocks": 3, "caption_blocks": 1},
}


# ------------------------------------------------------------------------------------------ compare
# as in the paper: DPM-Solver++, guided at all noise levels
SAMPLING = {"sampler": "dpm", "guidance_interval": (0.0, 1.0)}
CURVE_SCENES = slice(2048, 2560)       # of the validation split; the table has the first 2048
TARGET = 60                            # % right, for the time to equal accuracy
# Student's t for a mean of n values, at 95 %
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}


def seed_interval(values):
    """Half-width of the 95 % interval of a mean over seeds; nan if there is only one."""
    n = len(values)
    if n < 2:
        return math.nan
    t = STUDENT_T[min(n, 7)]                     # beyond 7 values a little too wide
    return float(t * np.std(values, ddof=1) / n**0.5)


def compare(args, device, precision):
    """The paper's experiment, smaller, and controls. Cross-attention has one seed, to save time."""
    base = common.make_config(Config, PRESETS, args)
    data = toy.prepare(base.data, base.clip, base.size)
    folder = Path(args.out or "runs/compare")
    # the steps whose weights are kept for the curves: from half-way on
    eighths = tuple(base.steps * i // 8 for i in (4, 5, 6, 7, 8))
    base = dataclasses.replace(base, snapshot_at=eighths)
    variants = {name: dataclasses.replace(base, **VARIANTS[name]) for name in args.variants}
    results = {name: [] for name in variants}
    for seed in range(args.seeds):
        for name, cfg in variants.items():
            if seed and cfg.fusion == "cross":
                continue
            cfg = dataclasses.replace(cfg, seed=seed)
            run = folder / f"{name}-{seed}"
            results[name].append(train_variant(cfg, data, run, args, device, precision))
    costs = step_costs(variants, device, precision, args.compile)
    figures = accuracy_table(results, costs, base.steps)
    figures |= time_table(results, costs)
    figures |= paired_differences(results)
    # without nan: one seed has no interval, and some curves never reach TARGET
    figures = {name: value for name, value in figures.items() if not math.isnan(value)}
    common.write_results(folder, figures)
    curves = {name: mean_curve(runs) for name, runs in results.items()}
    common.plot(curves, folder / "curves.png", "step", "held-out captions right, %")
    print(f"accuracy against steps, plotted: {folder / 'curves.png'}")
    draw_variants(folder, list(variants), data, device, precision)


def train_variant(cfg, data, folder, args, device, precision):
    """Trains and grades one variant; reads the figures of a finished one."""
    print(f"\ninto {folder}/")
    # resumes if it was stopped, does nothing if it is finished, refuses other settings
    args.resume = not args.overwrite and (folder / "state.pt").exists()
    graded = folder / "graded.json"              # eval.py may write other figures to results.json
    if not args.resume:
        graded.unlink(missing_ok=True)           # what is trained now is not graded yet
    pipeline = uvit_fusion.train(cfg, data, folder, args, device, precision)
    if graded.exists():
        figures = common.read_json(graded)
        if figures["samples"] == args.samples:
            return figures
    figures, table = judge.accuracy(pipeline, data, args.samples, **SAMPLING)
    judge.print_accuracy(figures, table, str(folder))
    figures["curve"] = accuracy_curve(folder, cfg.snapshot_at, data, device, precision)
    common.write_json(graded, figures)
    return figures


def accuracy_curve(folder, steps, data, device, precision):
    """[step, % right] of the weights that a training kept at `steps`; from 0 % at step 0."""
    scenes, captions, unseen = (part[CURVE_SCENES] for part in judge.validation_scenes(
        data, CURVE_SCENES.stop))
    curve = [[0, 0.0]]
    for step in steps:
        weights = folder / f"step{step}.safetensors"
        pipeline = uvit_fusion.load_pipeline(weights, device, precision)
        images = pipeline.generate(captions, progress=True, **SAMPLING)
        right = judge.grade_images(images, scenes, unseen)["all"]
        curve.append([step, 100 * float(right.mean())])
    return curve


def mean_curve(runs):
    """The mean of the curves of several seeds, [step, % right]."""
    return np.mean([run["curve"] for run in runs], axis=0).tolist()


def accuracy_table(results, costs, steps):
    """Prints and returns means over seeds, of {name: [figures of each seed]}."""
    rows = [["", "M parameters", "all right, %", "+-", "unseen", "count", "relation", "seeds"]]
    figures = {}
    for name, runs in results.items():
        right = [run["all"] for run in runs]
        figures[f"{name}_all"] = float(np.mean(right))
        figures[f"{name}_all_ci"] = seed_interval(right)
        figures[f"{name}_parameters"] = costs[name]["parameters"]
        row = [name, f"{costs[name]['parameters'] / 1e6:.2f}", figures[f"{name}_all"],
               figures[f"{name}_all_ci"]]
        for field in ("all_unseen", "count", "relation"):
            row.append(float(np.mean([run[field] for run in runs])))
        rows.append([*row, len(runs)])
    common.print_table(rows, f"fusion variants after {steps} steps; intervals over seeds")
    return figures


def time_table(results, costs):
    """Prints and returns how long each variant trains until TARGET % are right.

    By the mean curve over seeds; for an interval, the curve of every seed must get there.
    """
    rows = [["", "steps", "+-", "GFLOPs, forward", "ms a step", "seconds", "+-"]]
    figures = {}
    for name, runs in results.items():
        steps = time_until(mean_curve(runs), TARGET)
        steps_ci = seed_interval([time_until(run["curve"], TARGET) for run in runs])
        ms = costs[name]["ms"]
        figures[f"{name}_steps_to_{TARGET}"] = steps
        figures[f"{name}_steps_to_{TARGET}_ci"] = steps_ci
        figures[f"{name}_seconds_to_{TARGET}"] = steps * ms / 1e3
        figures[f"{name}_seconds_to_{TARGET}_ci"] = steps_ci * ms / 1e3
        rows.append([name, f"{steps:.0f}", f"{steps_ci:.0f}", f"{costs[name]['gflops']:.3f}", ms,
                     f"{steps * ms / 1e3:.0f}", f"{steps_ci * ms / 1e3:.0f}"])
    common.print_table(rows, f"until {TARGET} % of {CURVE_SCENES.stop - CURVE_SCENES.start} other "
                       "captions are right; nan: not within these steps")
    return figures


def paired_differences(results):
    """How far intermediate fusion is ahead of each other variant, seed by seed.

    Runs of one seed have the same data and noise. "difference" alone is that to early fusion.
    """
    intermediate = results.get("intermediate", [])
    figures = {}
    rows = [["intermediate minus", "points", "+-", "seeds"]]
    for name, runs in results.items():
        differences = [ours["all"] - run["all"] for ours, run in zip(intermediate, runs)]
        if name == "intermediate" or not differences:
            continue
        label = "difference" if name == "early" else f"difference_{name}"
        figures[label] = float(np.mean(differences))
        figures[f"{label}_ci"] = seed_interval(differences)
        rows.append([name, f"{figures[label]:+.1f}", figures[f"{label}_ci"], len(differences)])
        if name == "early":
            figures["seeds"] = len(differences)
    common.print_table(rows, "paired by seed")
    return figures


def draw_variants(folder, names, data, device, precision):
    """A grid of the variants of seed 0: the same captions and noise, a row a variant."""
    _, captions, _ = judge.validation_scenes(data, 8)
    images = []
    for name in names:
        pipeline = uvit_fusion.load_pipeline(folder / f"{name}-0", device, precision)
        images.extend(pipeline.generate(captions))
    texts = [""] * 8 * (len(names) - 1) + captions                        # below the last row
    path = folder / "samples" / "variants.png"
    common.image_grid(images, texts, path, columns=8, titles=names)
    print(f"the same captions and noise, a row per variant: {path}")


# --------------------------------------------------------------------------------------------- cost
def random_inputs(cfg, batch_size, device):
    """x, t, text and mask of a training step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, cfg.channels, cfg.size, cfg.size, generator=generator)
    t = torch.randint(1, 1001, (batch_size,), generator=generator)
    text = torch.randn(batch_size, cfg.text_length, cfg.text_dim, generator=generator)
    lengths = torch.randint(8, cfg.text_length, (batch_size, 1), generator=generator)
    mask = torch.arange(cfg.text_length) < lengths
    return [part.to(device) for part in (x, t, text, mask)]


def forward_flops(cfg):
    """Floating-point operations of one forward pass at batch 1; a multiply-add counts as two."""
    # in bf16 the network uses the plain softmax on CPUs; the fused kernel would not be counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            UViT(cfg)(*random_inputs(cfg, 1, "cpu"))
    return counter.get_total_flops()


def milliseconds(call, device):
    """How long call() takes, including its work on a GPU."""
    begin = time.perf_counter()
    call()
    common.synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


class TrainingStep:
    """A step of training (forward, backward, optimizers; no text encoder) of one variant."""
    def __init__(self, cfg, device, precision, wanted):
        torch.manual_seed(0)
        self.model = UViT(cfg).to(device)
        self.network = uvit_fusion.prepare_network(self.model, cfg, device, precision, wanted)
        # another network: a compiled `denoise` within a compiled `forward` would be compiled twice
        self.sampler = UViT(cfg).to(device)
        if self.network is not self.model:                                # it was compiled
            self.sampler.denoise = uvit_fusion.compile_network(self.sampler.denoise, device)
        self.optimizers = uvit_fusion.make_optimizers(
            self.model, cfg, precision, cfg.muon_names())
        self.inputs = random_inputs(cfg, cfg.batch_size, device)
        # generating a whole batch would take a CPU minutes
        few = cfg.batch_size if device.type == "cuda" else max(1, cfg.batch_size // 8)
        self.few_inputs = random_inputs(cfg, few, device)
        self.diffusion = Diffusion(cfg.schedule, cfg.target)
        self.device = device
        self.precision = precision

    def __call__(self):
        x = self.inputs[0]
        with common.autocast(self.device, self.precision):
            loss = F.mse_loss(self.network(*self.inputs).float(), x)
        self.model.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def sample(self, steps=20):
        """Generates from `few_inputs`, in guided steps."""
        x, _, text, mask = self.few_inputs
        with common.autocast(self.device, self.precision):
            denoiser = uvit_fusion.cfg_denoiser(
                self.sampler, text, mask, text[:1], mask[:1], 3.0)
            self.diffusion.sample(denoiser, x, steps)


def step_costs(variants, device, precision, wanted=None, rounds=10):
    """{name: {parameters, gflops, ms, sample_ms}} of variants {name: Config}.

    wanted: whether to compile, as in `uvit_fusion.prepare_network`.
    They take turns and the median counts, so that other work on the machine affects all alike.
    """
    steps = {name: TrainingStep(cfg, device, precision, wanted)
             for name, cfg in variants.items()}
    ms = {name: [] for name in variants}
    for _ in range(2 + rounds):                                           # two to warm up
        for name, step in steps.items():
            ms[name].append(milliseconds(step, device))
    costs = {}
    for name, step in steps.items():
        step.sample(1)                                                    # to warm up
        sample_ms = milliseconds(step.sample, device)
        costs[name] = {
            "parameters": sum(p.numel() for p in step.model.parameters()),
            "gflops": forward_flops(variants[name]) / 1e9,
            "ms": float(np.median(ms[name][2:])),                         # without the warm-up
            "sample_ms": sample_ms / len(step.few_inputs[0]),
        }
    return costs


def cost(args, device, precision):
    """Two tables, at the sizes of the toy world and the paper, and a step of toy training.

    Figures of a GPU have "gpu" before the unit at the end of their name.
    """
    on_gpu = device.type == "cuda"
    folder = Path(args.out or "runs/cost")
    two = {name: VARIANTS[name] for name in ("early", "intermediate")}
    small = cost_table("toy", two, Config().batch_size, 40, args, device, precision)
    # a step of 256 takes a CPU half a minute
    batch_size = getattr(args, "batch_size", 256 if on_gpu else 32)
    sweep = SWEEP
    # compiling takes a minute a row
    if args.compile or (args.compile is None and on_gpu):
        sweep = {name: SWEEP[name] for name in ("early", "intermediate")}
    figures = cost_table("coco", sweep, batch_size, 8, args, device, precision)
    latents_per_second = 1e3 / figures["intermediate_sample_ms"]
    figures |= {f"toy_{name}": value for name, value in small.items()}
    figures |= single_changes(device, precision)
    figures["toy_step_ms"] = training_step_ms(folder / "training", args, device, precision)
    if on_gpu:
        figures["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
        # "toy_step_ms" becomes "toy_step_gpu_ms"
        figures = {"_gpu_".join(name.rsplit("_", 1)): value for name, value in figures.items()}
    figures["latents_per_second_gpu" if on_gpu else "latents_per_second"] = latents_per_second
    common.write_results(folder, figures)


def single_changes(device, precision):
    """What makes a step of the toy training fast, each measured without and with it, in ms.

    muon: many matrices in one product; text: features of captions are kept; attention: the faster
    kernel, forward and backward.
    """
    cfg = Config()
    torch.manual_seed(0)
    model = UViT(cfg).to(device)
    _, muon = uvit_fusion.make_optimizers(model, cfg, precision, cfg.muon_names())
    matrices = muon.param_groups[0]["params"]
    for parameter in matrices:
        parameter.grad = torch.randn_like(parameter)
    data = toy.prepare(cfg.data, cfg.clip)
    _, captions, _ = judge.validation_scenes(data, cfg.batch_size)
    text_encoder = encoders.TextEncoder(cfg.clip, device)
    text_encoder.keep(captions)
    q = torch.randn(cfg.batch_size, cfg.heads, 57, cfg.dim // cfg.heads, device=device,
                    dtype=precision, requires_grad=True)
    calls = {
        "muon_without_ms": torch.optim.Muon(matrices).step,
        "muon_ms": muon.step,
        "text_without_ms": lambda: text_encoder.encode(captions),
        "text_ms": lambda: text_encoder(captions),
        "attention_without_ms":
            lambda: F.scaled_dot_product_attention(q, q, q).sum().backward(),
        "attention_ms": lambda: uvit_fusion.attention(q, q, q).sum().backward(),
    }
    figures = {}
    for name, call in calls.items():
        ms = [milliseconds(call, device) for _ in range(22)]
        figures[name] = float(np.median(ms[2:]))                          # without the warm-up
    rows = [["ms", "without", "with"]]
    for name in ("muon", "text", "attention"):
        rows.append([name, figures[f"{name}_without_ms"], figures[f"{name}_ms"]])
    common.print_table(rows, "Muon's many matrices in one product, cached caption features, "
                       f"the faster attention: one change at a time, {common.machine()}")
    return figures


def training_step_ms(folder, args, device, precision):
    """ms a step of `uvit_fusion.train` on the toy world: images, text and averages included."""
    # the first epoch also decodes the images, which takes longer than a GPU's whole step
    steps = 2000 if device.type == "cuda" else 200
    cfg = Config(steps=steps, snapshot_at=())
    data = toy.prepare(cfg.data, cfg.clip)
    args.resume = False
    args.overwrite = True
    uvit_fusion.train(cfg, data, folder, args, device, precision)          # which prints it too
    return common.read_json(folder / "results.json")["step_ms"]


def cost_table(preset, changes, batch_size, rounds, args, device, precision):
    """Measures and prints the costs of variants of a preset, {name: its changes}.

    Returns the figures of early and intermediate fusion.
    """
    base = Config(**PRESETS[preset])
    variants = {name: dataclasses.replace(base, batch_size=batch_size, **change)
                for name, change in changes.items()}
    costs = step_costs(variants, device, precision, args.compile, rounds)
    peak = common.matmul_rate(device, precision, 4096)
    early = costs["early"]
    figures = {}
    rows = [["", "v", "c", "M parameters", "GFLOPs", "saved, %", "ms a step", "speed-up",
             "% of peak", "ms an image"]]
    for name, cfg in variants.items():
        own = costs[name]
        saved = 100 * (1 - own["gflops"] / early["gflops"])
        speedup = early["ms"] / own["ms"]
        # a backward pass costs twice a forward pass
        rate = 3 * own["gflops"] * 1e9 * batch_size / (own["ms"] / 1e3)
        utilisation = 100 * rate / peak
        rows.append([name, cfg.image_blocks, cfg.caption_blocks, f"{own['parameters'] / 1e6:.2f}",
                     f"{own['gflops']:.3f}", saved, own["ms"], f"{speedup:.2f}", utilisation,
                     own["sample_ms"]])
        if name in ("early", "intermediate"):
            for figure in ("gflops", "ms", "sample_ms"):
                figures[f"{name}_{figure}"] = own[figure]
        if name == "intermediate":
            figures["flops_saved_percent"] = saved
            figures["step_speedup"] = speedup
            figures["mfu_percent"] = utilisation
    common.print_table(rows, f"preset {preset}, batch {batch_size}, {common.machine()}, "
                       f"{str(precision).removeprefix('torch.')}; peak {peak / 1e12:.2f} TFLOP/s; "
                       "an image: 20 guided steps")
    return figures


# ------------------------------------------------------------------------------------------ analyse
def effective_rank(matrices):
    """exp of the entropy of the normalised singular values: (..., Q, K) -> (...).

    Roy and Vetterli 2007; from 1 to min(Q, K).
    """
    values = torch.linalg.svdvals(matrices.cpu().double())                # some GPUs lack float64
    p = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
    return entropy.exp()


@torch.no_grad()
def text_attention(pipeline, images, captions, t):
    """Attention of patches to text in each joint block: [(B, H, N, L)], and token_mask (B, L)."""
    cfg = pipeline.cfg
    torch.manual_seed(t)
    x_0 = pipeline.encode(images)
    timesteps = torch.full((len(x_0),), t, device=pipeline.device)
    x_t = pipeline.diffusion.q_sample(x_0, timesteps, torch.randn_like(x_0))
    text, mask = pipeline.text_encoder(captions)
    y = pipeline.model.encode_text(text, mask)
    _, logits = pipeline.model.denoise(x_t, timesteps, y, mask, return_logits=True)
    patches = (cfg.size // cfg.patch)**2
    # keys are [time, patches, text] in cross-attention, [time, text, patches] in concatenation
    first = 1 + patches if cfg.fusion == "cross" else 1
    maps = []
    for block in logits:
        maps.append(block.softmax(-1)[:, :, -patches:, first:first + cfg.text_length])
    return maps, mask


def ranks_and_shares(pipeline, images, captions):
    """Effective ranks (blocks, images), and text's share of the patches' attention (blocks,).

    Averaged over heads and five noise levels.
    """
    ranks = []                                                            # (levels, blocks, images)
    shares = []                                                           # (levels, blocks)
    for t in (100, 300, 500, 700, 900):
        maps, mask = text_attention(pipeline, images, captions, t)
        lengths = mask.sum(1).tolist()                                    # without padding
        block_ranks = []
        for block in maps:
            image_ranks = [effective_rank(heads[:, :, :length]).mean().item()
                           for heads, length in zip(block, lengths)]
            block_ranks.append(image_ranks)
        ranks.append(block_ranks)
        shares.append([block.sum(-1).mean().item() for block in maps])
    return np.mean(ranks, axis=0), np.mean(shares, axis=0)


def analyse(args, device, precision):
    """Effective rank of text-to-image attention, and its share of all attention, by block.

    Rows of the matrix are patches, columns the caption's real tokens. Rank 1: all patches look at
    the text alike.
    """
    pipeline = sample.load_run(args.run, args.device, args.precision)
    cfg = pipeline.cfg
    data = toy.prepare(cfg.data, cfg.clip, pipeline.image_size)
    dataset = pipeline.dataset(data, "val")
    images = torch.stack([dataset.image(i) for i in range(64)])
    captions = [texts[0] for _, texts, _ in dataset.items[:64]]
    ranks, shares = ranks_and_shares(pipeline, images, captions)
    half = cfg.depth // 2
    names = [*(f"in_{i}" for i in range(half)), "middle", *(f"out_{i}" for i in range(half))]
    names = names[cfg.image_blocks:len(names) - cfg.image_blocks]         # of the joint blocks
    rows = [["block", "effective rank", "+-", "share of attention, %"]]
    figures = {}
    for name, rank, share in zip(names, ranks, shares):
        rows.append([name, f"{rank.mean():.2f}", f"{common.ci95(rank):.2f}", 100 * share])
        figures[f"rank_{name}"] = float(rank.mean())
        figures[f"share_{name}"] = 100 * float(share)
    _, mask = pipeline.text_encoder(captions)
    tokens = mask.sum(1).float().mean().item()
    common.print_table(rows, f"text-to-image attention of {args.run}; the rank is at most the mean "
                       f"number of tokens, {tokens:.1f}")
    folder, _ = common.run_files(args.run)
    common.write_results(folder, figures)
    numbers = range(cfg.image_blocks, cfg.image_blocks + len(names))
    curves = {"effective rank": list(zip(numbers, ranks.mean(1))),
              "share of attention x 10": list(zip(numbers, 10 * shares))}
    common.plot(curves, folder / "attention_rank.png", "block", "text-to-image attention")
    print(f"plotted: {folder / 'attention_rank.png'}")


# -------------------------------------------------------------------------------------------- steps
def steps_curve(args, device, precision):
    """Accuracy against the number of sampling steps, a table and <run>/steps.png."""
    pipeline = sample.load_run(args.run, args.device, args.precision)
    data = toy.prepare(pipeline.cfg.data, pipeline.cfg.clip, pipeline.image_size)
    numbers = (5, 10, 15, 25, 50, 100)
    rows = [["all right, %, after", *(f"{steps} steps" for steps in numbers)]]
    curves = {}
    figures = {}
    for sampler in ("ddpm", "ddim", "dpm"):
        row = [sampler]
        for steps in numbers:
            graded, _ = judge.accuracy(pipeline, data, args.samples, sampler=sampler, steps=steps)
            row.append(graded["all"])
            figures[f"{sampler}_{steps}"] = graded["all"]
        curves[sampler] = list(zip(numbers, row[1:]))
        rows.append(row)
    common.print_table(rows, f"{args.run}: {args.samples} held-out captions")
    folder, _ = common.run_files(args.run)
    common.plot(curves, folder / "steps.png", "network evaluations", "held-out captions right, %")
    common.write_results(folder, figures)
    print(f"plotted: {folder / 'steps.png'}")


EXPERIMENTS = {"compare": compare, "cost": cost, "analyse": analyse, "steps": steps_curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what to do")
    parser.add_argument("--run", default="runs/uvit_fusion", help="analyse, steps: the run")
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="compare, steps: held-out captions to grade (default %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS),
                        metavar="NAME", help="compare: some of %(choices)s (default all)")
    parser.add_argument("--seeds", type=common.positive, default=3,
                        help="compare: seeds for concatenation (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="compare, cost: torch.compile (default: as in uvit_fusion.py)")
    common.add_training_flags(
        parser, "compare, cost: folder (default runs/compare, runs/cost)")
    common.add_config_flags(parser, Config, PRESETS)
    parser.set_defaults(workers=None, validation_samples=0)               # for `uvit_fusion.train`
    args = parser.parse_args()
    device = common.pick_device(args.device)
    EXPERIMENTS[args.experiment](args, device, common.pick_precision(args.precision, device))


if __name__ == "__main__":
    common.entry(main)
