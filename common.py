"""What the five methods share: settings and flags, files, LoRA, the run folder, tables, pictures.

    flags      -> make_config -> a dataclass of settings
    a training -> Run         -> runs/<name>/{config.json, model.safetensors, metrics.csv, ...}

A user's mistake raises `UserError`; `entry` prints one line.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from tqdm import tqdm


class UserError(Exception):
    """Something the user can fix: one line that says what is wrong and what to do."""


def entry(main):
    """Runs a script's main(); a `UserError` ends it with one line on stderr and exit status 2."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):              # a pipe or Windows may lack characters:
            stream.reconfigure(errors="replace")        # they are printed as "?"
    try:
        with reading("the command line", "type it in UTF-8"):
            " ".join(sys.argv).encode()
        return main()
    except KeyboardInterrupt:
        sys.exit(130)                                   # as shells report Ctrl-C
    except (UserError, OSError) as error:
        reason = str(error).split("UserError: ")[-1].strip()     # after a worker's traceback
    except (MemoryError, RuntimeError) as error:
        reason = system_failure(error)
        if not reason:
            raise
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {reason}", sys.stderr)      # below a progress bar
    sys.exit(2)


def system_failure(error):
    """What to do about an error that is not the program's fault; "" for any other error."""
    text = str(error)
    if "DataLoader worker" in text:
        return f"a process that reads images died ({text.splitlines()[0]}): try fewer --workers"
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or re.search("allocate memory|out of memory|size calculation overflow", text):
        return "out of memory: try a smaller --batch-size or a smaller network"
    return ""


def say_why(error):
    """An exception in a few words."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def is_failure(error):
    """Whether an exception means that something failed, not that the process should end."""
    # a damaged tokenizer can raise the panic of a Rust library, which is not an Exception
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading(name, hint):
    """Wraps the reading of a user's file: whatever it raises becomes one line.

    Damaged content can raise nearly anything, even after it has been parsed, so what is read is put
    into its final shape within the block. The line: `name`, the reason, and `hint`, what to do.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):         # not the file's fault
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(f"{name}: {say_why(error)}: {hint}") from None


def read_text(path):
    """The text of a UTF-8 file, without the byte order mark that some editors put first."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not in UTF-8 ({content[error.start:][:4]}): "
                        "save it as UTF-8") from None


def read_json(path):
    """The JSON object of a file."""
    with reading(path, "expected one JSON object: get a fresh copy"):
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise ValueError(f"it begins with {str(content)[:20]!r}")
    return content


def read_json_lines(path, name, fields):
    """The JSON objects of a file, one per line, with strings in `fields`; `name`: for messages."""
    with reading(name, "it cannot be read"):
        lines = read_text(path).split("\n")             # JSON strings may hold other line breaks
    expected = ", ".join(f'"{field}": ...' for field in fields)
    objects = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f"{name}, line {n}: expected {{{expected}}}, found {line[:60]!r}", "fix it"):
            content = json.loads(line)
            if not all(isinstance(content[field], str) for field in fields):
                raise TypeError("not a string")
        objects.append(content)
    return objects


def fingerprint(model, extra=""):
    """Identifies a frozen model down to its weights: hex, the same in any precision."""
    digest = hashlib.sha256(extra.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        # the start of each tensor is enough: hashing all of 7 billion numbers took a minute
        digest.update(tensor.flatten()[:64].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def frechet_distance(x, y):
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)): features (N, D), (M, D) -> float

    mu and S are mean and covariance of the features. Of Inception's, it is the FID (Heusel et al.
    2017, arXiv 1706.08500). S_x S_y has the eigenvalues of the symmetric S_x^(1/2) S_y S_x^(1/2),
    so eigh is enough.
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    s_x = np.cov(x, rowvar=False)
    s_y = np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(s_x)
    root = vectors * values.clip(0)**0.5 @ vectors.T    # rounding leaves values just below 0
    trace = (np.linalg.eigvalsh(root @ s_y @ root).clip(0)**0.5).sum()
    means = ((x.mean(0) - y.mean(0))**2).sum()
    return max(0.0, float(means + np.trace(s_x) + np.trace(s_y) - 2 * trace))


# -------------------------------------------------------------------------------------------- LoRA
class LoRA(nn.Module):
    """W -> W + B A (Hu et al. 2021, arXiv 2106.09685): W (out, in) is frozen; B starts at zero."""
    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns, device=weight.device) * columns**-0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        return weight + self.B @ self.A


def add_lora(model, rank, names=("qkv", "proj")):
    """Freezes a model and puts `LoRA` on its linear layers with these names, in place; returns it.

    Whatever reads `layer.weight` afterwards gets the sum. Only A and B require gradients.
    """
    model.requires_grad_(False)
    layers = [module for path, module in model.named_modules()
              if isinstance(module, nn.Linear) and path.split(".")[-1] in names]
    largest = min((side for layer in layers for side in layer.weight.shape), default=rank)
    if rank > largest:
        raise UserError(f"LoRA rank {rank} is above that of its matrices: at most {largest}")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return model


def merge_lora(model):
    """Writes W + B A into the weights, in place: the names are as before `add_lora`."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model.requires_grad_(False)


# -------------------------------------------------------------------------------------------- Muon
def orthogonalise(x, coefficients, steps, eps):
    """Sets the singular values of matrices x (n, rows, columns), rows <= columns, to about 1.

    The Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X of Muon (Jordan et al. 2024).
    """
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """PyTorch's Muon, but one product handles all matrices of a shape; on a GPU, of all shapes.

    precision: of these products. PyTorch's is always bf16, which takes forty times as long on a CPU
    without AVX-512.
    """
    def __init__(self, parameters, precision=torch.bfloat16, **settings):
        super().__init__(parameters, **settings)
        self.precision = precision

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            buffers = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffers.append(state["momentum_buffer"])
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, buffers, group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            self.update(group, parameters, directions)

    def update(self, group, parameters, directions):
        """parameters -= lr sqrt(max(1, rows / columns)) times the orthogonalised directions."""
        by_shape = {}
        for i, parameter in enumerate(parameters):
            by_shape.setdefault(parameter.shape, []).append(i)
        stacks = []
        for (rows, columns), numbers in by_shape.items():
            stack = torch.stack([directions[i] for i in numbers]).to(self.precision)
            # X X^T is the smaller of the two products if X is wide
            stacks.append(stack if rows <= columns else stack.mT.contiguous())
        settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if parameters[0].is_cuda:
            updates = unstack(orthogonalise(pad_and_stack(stacks), *settings), stacks)
        else:
            updates = [orthogonalise(stack, *settings) for stack in stacks]
        for ((rows, columns), numbers), update in zip(by_shape.items(), updates):
            rate = group["lr"] * max(1, rows / columns)**0.5
            update = update if rows <= columns else update.mT
            torch._foreach_add_(
                [parameters[i] for i in numbers], list(update.float()), alpha=-rate)


def pad_and_stack(stacks):
    """Matrices of several shapes, each (n, rows, columns), as one stack, padded with zeros.

    Zeros only add singular values of 0. On a GPU, launching a product of small matrices takes
    longer than computing it; padding large ones of different shapes would cost memory and time.
    """
    rows = max(stack.shape[1] for stack in stacks)
    columns = max(stack.shape[2] for stack in stacks)
    return torch.cat([F.pad(stack, (0, columns - stack.shape[2], 0, rows - stack.shape[1]))
                      for stack in stacks])


def unstack(padded, stacks):
    """Undoes `pad_and_stack`."""
    parts = padded.split([len(stack) for stack in stacks])
    return [part[:, :stack.shape[1], :stack.shape[2]] for part, stack in zip(parts, stacks)]


# ---------------------------------------------------------------------------- device and precision
def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    with reading(f"--device {name}", "it cannot be used here: try --device cpu"):
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError("choose cpu, cuda or mps")
        torch.zeros(1, device=name)
        return torch.device(name)


def keep_freed_memory():
    """Makes the C library keep up to 2 GB of freed memory for the next tensors.

    By default glibc returns freed blocks of a few MB to the system, which clears them page by page
    before the next step gets them: sampling in the toy world took a third longer on a CPU. Other C
    libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):  # not Linux; not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)                              # M_MMAP_THRESHOLD: the most it may be
        mallopt(-1, 2**31 - 1)                          # M_TRIM_THRESHOLD


def synchronize(device):
    """Waits until a GPU has finished, so a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def to_device(tensor, device):
    """A tensor on the CPU -> on `device`, without waiting for a GPU to finish earlier work."""
    # MPS must wait, or it would read the memory of a tensor that is gone
    return tensor.to(device, non_blocking=device.type == "cuda")


def matmul_rate(device, dtype, size):
    """Floating-point operations per second of a square matrix product, the best of ten tries."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ a.mT                                         # as in a linear layer
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def pick_precision(name, device):
    """"bf16" or "fp32" as asked; "auto": bf16 where its matrix products are 1.5 times as fast."""
    if name == "auto":
        # on a CPU a few milliseconds each, so one of the ten escapes other work on the machine
        size = 512 if device.type == "cpu" else 1024
        bf16 = matmul_rate(device, torch.bfloat16, size)
        fast = bf16 > 1.5 * matmul_rate(device, torch.float32, size)
        name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device, dtype):
    """bf16 or, with dtype float32, none: see `pick_precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


# ------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path to write to, renamed to `path` at the end: whole or not at all."""
    unfinished = Path(f"{path}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (RuntimeError, SafetensorError) as error:    # what some raise on a full disk
        if system_failure(error):
            raise
        raise OSError(f"{path} cannot be written: {say_why(error)}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path, content):
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def save_tensors(tensors, path):
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as unfinished:
        save_file(tensors, unfinished)


def read_weights(path, name, hint=""):
    """The tensors of a .safetensors file, or of a pickle of tensors whose code is never run.

    name, hint: how the message of a UserError begins and ends.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{name}: there is no file {path}{hint}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            mmap = zipfile.is_zipfile(path)             # read only what is used; old files cannot
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            for inner in ("ema", "state_dict", "model"):         # checkpoints nest them
                if isinstance(content.get(inner), dict):
                    content = content[inner]
        # what DistributedDataParallel and torch.compile put before the names
        return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor
                for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:                          # a damaged file can raise anything
        if "GLOBAL" in str(error):                      # the instruction that loads code
            raise UserError(f"{name} contains code, which is not run: "
                            "use the same model's .safetensors file") from None
        raise UserError(f"{name} is damaged, cut off or not a tensor file: "
                        f"copy or download it again{hint}") from None


def load_into(model, tensors, path):
    """model.load_state_dict, with one line that says what does not fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} holds a network with other settings ({name}: "
                f"{found.get(name, 'nothing')} in the file, {expected.get(name, 'nothing')} here)")
    model.load_state_dict(tensors)


# ---------------------------------------------------------------------------------------- settings
def whole(text, lowest=-2**31, highest=2**32 - 1):
    """The type of a flag that takes a whole number, of 32 bits."""
    if not re.fullmatch(r"-?\d{1,10}", text) or not lowest <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not an integer from {lowest} to "
                                         f"{highest}")
    return int(text)


def natural(text):
    """The type of a flag that takes a whole number, 0 or above."""
    return whole(text, lowest=0)


def positive(text):
    """The type of a flag that counts something; more would not fit into memory."""
    return whole(text, 1, 10**6)


def finite(text):
    """The type of a flag that takes a number."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


NUMBERS = {int: whole, float: finite}


def add_config_flags(parser, config_class, presets):
    """--preset, and a flag for each field with a trailing comment, which is its help text."""
    group = parser.add_argument_group("settings")
    own = "; pictures with your own --data" if "pictures" in presets else ""
    group.add_argument("--preset", choices=presets,
                       help=f"settings to start from (default toy{own})")
    source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
    for field in dataclasses.fields(config_class):
        if field.name not in comments:
            continue
        options = {"type": NUMBERS.get(field.type, field.type)}
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            options = {"type": NUMBERS[type(field.default[0])], "nargs": len(field.default)}
        elif typing.get_args(field.type):                        # Literal["a", "b"]
            options = {"choices": typing.get_args(field.type)}
        text = f"{comments[field.name]} (toy: {field.default})".replace("%", "%%")
        # SUPPRESS: a flag not given is not in the arguments, so the preset's value holds
        group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=text, **options)


def check_value(kind, default, value):
    """A value from JSON or a flag, converted to a field's type; raises if it does not fit."""
    if kind is tuple:
        return tuple(check_value(type(default[0]), default[0], number) for number in value)
    if kind in NUMBERS and not isinstance(value, bool):
        number = NUMBERS[kind](str(value))
        if number < 0 < default:
            raise ValueError(f"{number} is below 0")
        return number
    choices = typing.get_args(kind)
    if value not in choices if choices else type(value) is not kind:
        raise ValueError(f"{value!r} is not valid")
    return value


# lowest and highest values of settings that several methods share; a seed is multiplied by up to
# 10^11, and the product must fit in 64 bits
BOUNDS = {
    "steps": (1, 2**31), "batch_size": (1, 2**20), "warmup": (0, 2**31), "decay": (0, 1),
    "lr": (1e-12, 1e3), "muon_lr": (1e-12, 1e3), "betas": (0, 1 - 1e-9), "ema": (0, 1),
    "caption_dropout": (0, 1), "heads": (1, 1000), "seed": (0, 10**8),
}


def check_bounds(cfg, **own):
    """Refuses settings beyond BOUNDS or a method's own bounds, {name: (lowest, highest)}.

    Beyond them an error comes far from its cause, memory runs out, or nothing is learned.
    """
    for name, (lowest, highest) in (BOUNDS | own).items():
        value = getattr(cfg, name, lowest)
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if not lowest <= number <= highest:
                raise UserError(
                    f"--{name.replace('_', '-')} {number}: expected {lowest} to {highest}")


def build_config(config_class, values, source="--"):
    """The settings of {name: value}, from JSON or from flags; source: before names in messages."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    checked = {}
    for name, value in values.items():
        flag = name.replace("_", "-") if source == "--" else name
        with reading(f"{source}{flag}", "no such setting, or an invalid value"):
            checked[name] = check_value(fields[name].type, fields[name].default, value)
    return config_class(**checked)


def make_config(config_class, presets, args):
    """The settings of args.preset, with the flags that were given on top."""
    preset = args.preset
    if preset is None:
        if getattr(args, "data", "shapes") not in ("shapes", "simple"):
            preset = "pictures"
        elif getattr(args, "quick", False):
            preset = "quick"
    names = {field.name for field in dataclasses.fields(config_class)}
    given = {name: value for name, value in vars(args).items() if name in names}
    # without a preset the defaults hold, which are those of "toy"
    return build_config(config_class, presets.get(preset, {}) | given)


def relocate(path, folder):
    """A path in a run's config; if it does not exist, as seen from a folder above the run."""
    if not os.path.exists(path):
        for parent in Path(folder).resolve().parents:
            if (parent / path).exists():
                return str(parent / path)
    return path


def read_config(config_class, folder, name="config.json"):
    """The settings of a run folder."""
    path = Path(folder) / name
    content = read_json(path)
    with reading(path, "not the settings of this method"):
        for setting, value in content.items():          # such as runs/toy/clip
            if isinstance(value, str) and ("/" in value or "." in value):
                content[setting] = relocate(value, folder)
        return build_config(config_class, content, f"{path}: ")


# set by the flag alone, at each start: a run folder from elsewhere must not switch it on
TRUST_REMOTE_CODE = False


class TrustRemoteCode(argparse.Action):
    def __call__(self, *_):
        global TRUST_REMOTE_CODE
        TRUST_REMOTE_CODE = True


def add_device_flags(parser):
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first available)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"),
                        help="auto: bf16 where it is faster")
    parser.add_argument("--trust-remote-code", action=TrustRemoteCode, nargs=0,
                        help="run the Python code that comes with a language model or text "
                             "encoder: its authors' code can do anything here that you can")


def add_training_flags(parser, out_help, quick=None):
    """quick: see `parse_args`."""
    parser.add_argument("--out", help=out_help)
    if quick:
        parser.add_argument("--quick", action="store_true",
                            help=f"a smaller run that takes minutes, in {quick['out']}")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true",
                       help="continue the run in --out where it stopped")
    start.add_argument("--overwrite", action="store_true",
                       help="start over, replacing the run in --out")
    add_device_flags(parser)


def parse_args(parser, quick):
    """The arguments; with --quick, the dict `quick` replaces defaults: {name: value}."""
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args()                      # what was given stays as it was given
    return args


def refuse_flags(parser, args, names, reason):
    """A flag that would have no effect is refused, not ignored."""
    for name in names:
        if getattr(args, name, parser.get_default(name)) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect here: {reason}")


# -------------------------------------------------------------------------------------- run folder
def run_files(path):
    """(folder, weights) of a run, named by its folder or by a .safetensors file in it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return path.parent, path
    return path, path / "model.safetensors"


def check_run(folder, args):
    """Refuses to train over another run by mistake, and to resume where there is none."""
    # chosen.pt: what a round of fine_rewards.py learns from, made before its first checkpoint
    has_state = any(Path(folder).rglob("state.pt")) or any(Path(folder).glob("*/chosen.pt"))
    holds_run = has_state or any(Path(folder).glob("*.safetensors"))
    if Path(folder).is_file():
        raise UserError(f"--out {folder} is a file, not a folder")
    if args.resume and not has_state:
        raise UserError(f"--resume: there is no run in {folder}/ to continue")
    if holds_run and not args.resume and not args.overwrite:
        raise UserError(f"{folder}/ already holds a run: --resume to continue, --overwrite to "
                        "start over, --out for another folder")


def remove_run(folder):
    """Deletes what a training left in a folder: nothing old may stand beside what is new."""
    for pattern in ("state.pt", "*.safetensors", "results.json", "metrics.csv"):
        for old in Path(folder).glob(pattern):
            old.unlink()


def may_go_on(name, before, now):
    """Whether a run with `name` = `before` can resume with the settings `now`, {name: value}."""
    value = now[name]
    depends_on_steps = now.get("decay") != 0 or now.get("noise_first")
    if name == "steps" and not depends_on_steps and type(before) is int:
        return before <= value                          # neither rate nor noise depends on it
    if isinstance(value, str) and isinstance(before, str):
        spelled = [path for path in (before, value) if os.path.exists(path)]
        return before == value or (len(spelled) == 2 and os.path.samefile(*spelled))
    return before == value


def check_settings(folder, cfg, same_data=False):
    """Refuses to resume in a run folder with other settings; returns its new config."""
    before = read_json(Path(folder) / "config.json")
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))    # lists for tuples, as in the file
    for name in now:
        if not (same_data and name == "data") and not may_go_on(name, before.get(name), now):
            hint = "use the same settings or another --out"
            if name == "steps" and "init" in now:
                hint = ("its schedule ends with the last step; to train longer, start "
                        f"a new --out with --init {folder}/model.safetensors")
            raise UserError(f"{folder}/ was started with {name} = {before.get(name)}, now it is "
                            f"{now[name]}: {hint}")
    return before | now


def load_part(part, saved):
    """part.load_state_dict; for an optimizer, which itself checks little, only the state."""
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(saved)
        return
    # its settings are those of the config, which were compared
    part.load_state_dict(saved | {"param_groups": part.state_dict()["param_groups"]})
    names = {tuple(values) for values in part.state.values()}
    fits = [value.shape in ((), parameter.shape)
            for parameter, values in part.state.items() for value in values.values()]
    if len(names) > 1 or not all(fits):
        raise ValueError("the state of an optimizer does not fit")


def read_metrics(path):
    """(names, rows) of a metrics.csv, in cells; a row that was cut off is left out."""
    heading, *lines = path.read_text(errors="replace").split("\n")
    if not re.fullmatch(r"step(,\w+)*", heading, re.ASCII):
        raise UserError(f"{path} has lost its header: delete it")
    names = heading.split(",")
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            step, *cells = line.split(",")
            for cell in [step, *filter(None, cells)]:        # a blank cell is not known yet
                float(cell)
            if 1 + len(cells) == len(names):
                rows.append([step, *cells])
    return names, rows


class Run:
    """The folder of one training: config.json, metrics.csv, checkpoints; and its progress bar.

    parts: modules and optimizers, whose saved state is restored with args.resume.
    weights: {name: tensor} for model.safetensors; each save writes their values at that time.
    dataset: what it learns from, so it can resume with the same data in another place.
    `start`: the step after which training resumes, 0 for a new run.
    """
    def __init__(self, folder, cfg, parts, weights, args, precision, save_every=1000,
                 title="training", rank=0, dataset=None):
        self.folder = Path(folder)
        self.parts = parts
        self.weights = weights
        self.precision = str(precision)
        self.steps = cfg.steps
        self.save_every = save_every
        self.rank = rank                                # of several processes only rank 0 writes
        self.data = dataset.identity() if dataset else ""
        self.start = 0
        self.values = []                                # what was logged since the last row
        self.stopped = False
        if args.resume and (self.folder / "state.pt").exists():
            self.restore(cfg)
        elif rank == 0:
            if not args.resume:                         # a later stage of a resumed run is new
                check_run(self.folder, args)
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_run(self.folder)
            write_json(self.folder / "config.json", dataclasses.asdict(cfg))
        if rank == 0:                                   # left by a killed run
            for unfinished in self.folder.rglob("*.unfinished"):
                unfinished.unlink()
        self.saved = self.start                         # the step of the last checkpoint
        self.progress = tqdm(total=self.steps, initial=self.start, desc=title, unit="step",
                             disable=rank > 0 or self.start == self.steps)
        # torchrun's processes would each stop at a different step: there, Ctrl-C ends them at once
        if self.start < self.steps and "WORLD_SIZE" not in os.environ:
            signal.signal(signal.SIGINT, self.ask_to_stop)
            signal.signal(signal.SIGTERM, self.ask_to_stop)      # what clusters send

    def restore(self, cfg):
        path = self.folder / "state.pt"
        with reading(path, "it is damaged: start over with --overwrite"):
            if zipfile.ZipFile(path).testzip():         # compares checksums
                raise ValueError("its content has changed")
            state = torch.load(path, map_location="cpu", weights_only=True)
            precision = state["precision"]
        if precision != self.precision:
            flag = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}.get(precision, precision)
            raise UserError(f"{self.folder}/ was trained in {precision}, now it would be in "
                            f"{self.precision}: use --precision {flag}")
        settings = check_settings(self.folder, cfg, self.data and self.data == state.get("data"))
        with reading(path, "it is damaged: start over with --overwrite"):
            self.start = range(self.steps + 1).index(state["step"])
            for part, saved in zip(self.parts, state["parts"], strict=True):
                load_part(part, saved)
        path = self.folder / "metrics.csv"
        if self.rank == 0:
            write_json(self.folder / "config.json", settings)
        if self.rank == 0 and path.exists():            # drop the rows after the checkpoint
            names, rows = read_metrics(path)
            rows = [row for row in rows if float(row[0]) <= self.start]
            with atomic_write(path) as unfinished:
                unfinished.write_text("".join(",".join(row) + "\n" for row in [names, *rows]))

    def ask_to_stop(self, number, frame):
        self.stopped = True
        signal.signal(number, signal.default_int_handler)        # a second Ctrl-C ends at once

    def log(self, step, **values):
        """To be called at every step, with numbers or one-element tensors, or None for no value.

        Their means over 20 steps go to metrics.csv and to the progress bar.
        """
        # kept as tensors: float(x) at each step would make the CPU wait for the GPU
        row = {name: torch.as_tensor(x).detach().float() for name, x in values.items()
               if x is not None}
        self.values.append(row)
        self.progress.update()
        if step % 20 and step != self.steps:
            return
        means = {}
        for name in values:
            known = [row[name] for row in self.values if name in row]
            if known:
                means[name] = torch.stack(known).mean().item()
        self.values = []
        if not all(map(math.isfinite, means.values())):
            raise UserError(f"step {step}: {means} is no longer finite; the last checkpoint "
                            "is intact: try a lower --lr or --precision fp32")
        self.progress.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
        if self.rank == 0:
            with self.writing(), open(self.folder / "metrics.csv", "a") as file:
                if file.tell() == 0:
                    print("step", *values, sep=",", file=file)
                cells = [f"{means[name]:.6g}" if name in means else "" for name in values]
                print(step, *cells, sep=",", file=file)

    @contextlib.contextmanager
    def writing(self):
        """Wraps writing to the folder."""
        try:
            yield
        except OSError as error:
            advice = "make room and start again"
            if self.saved:
                advice = f"the checkpoint of step {self.saved} is intact: make room, then --resume"
            message = f"{self.folder}/ cannot be written: {say_why(error)}; {advice}"
            raise UserError(message) from None

    def due(self, step):
        return step % self.save_every == 0 or step == self.steps or self.stopped

    def save(self, step):
        """Writes the checkpoint and loss.png; after Ctrl-C, ends the process with status 130."""
        if self.rank == 0:
            state = {"step": step, "precision": self.precision, "data": self.data,
                     "parts": [part.state_dict() for part in self.parts]}
            with self.writing():
                save_tensors(self.weights, self.folder / "model.safetensors")
                with atomic_write(self.folder / "state.pt") as unfinished:
                    torch.save(state, unfinished)
                self.saved = step
                self.plot()
        if step < self.steps and not self.stopped:
            return
        self.progress.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.stopped:
            print(f"stopped after step {step}; to continue: the same command with --resume")
            sys.exit(130)

    def plot(self):
        path = self.folder / "metrics.csv"
        if path.exists():                               # not there before the first 20 steps
            names, rows = read_metrics(path)
            numbers = [[cell or "nan" for cell in row] for row in rows]
            steps, *columns = np.array(numbers, float).reshape(-1, len(names)).T
            curves = {name: list(zip(steps, column)) for name, column in zip(names[1:], columns)}
            plot(curves, self.folder / "loss.png", "step", "loss", log=True)


# ----------------------------------------------------------------------------------------- results
def ci95(values):
    """Half-width of the 95 % interval of the mean of independent values; nan are left out."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(1.96 * values.std() / max(1, len(values))**0.5)


def percent(name, verdicts):
    """{name: 100 times the mean of verdicts, name_ci: its 95 % interval}; nan are left out."""
    return {name: 100 * float(np.nanmean(verdicts)), f"{name}_ci": 100 * ci95(verdicts)}


def machine():
    """The name of the GPU that this process has used, or of the processor."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")                     # Linux names the processor only here
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def peak_memory_mb():
    """The most memory that this process has held so far, in MB."""
    try:
        import resource
    except ImportError:                                 # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024      # macOS gives bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write_results(folder, figures):
    """Adds figures {name: number} to <folder>/results.json, with commit, machine and command."""
    path = Path(folder) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read_json(path) if path.exists() else {}
    for name, value in figures.items():
        results[name] = float(f"{value:.5g}") if isinstance(value, float) else value
    git = subprocess.run("git describe --always --dirty", shell=True, capture_output=True,
                         text=True, cwd=Path(__file__).parent)
    results["commit"] = git.stdout.strip()              # empty where there is no git
    results["machine"] = machine()
    results["command"] = shlex.join(["python", *sys.orig_argv[1:]])
    write_json(path, results)


def finish(folder, figures, begin):
    """Writes the final figures of a run and its cost; begin: time.time() at the start."""
    seconds = time.time() - begin
    memory = peak_memory_mb()
    write_results(folder, figures | {"seconds": seconds, "peak_memory_mb": memory})
    print(f"{seconds:.0f} s in total, {memory:.0f} MB at peak; "
          f"figures in {Path(folder) / 'results.json'}")


def print_table(rows, title=""):
    """Prints rows of equal length in columns, the heading first; floats with one decimal."""
    cells = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    print(f"\n{title}")
    for first, *rest in cells:
        line = first.ljust(widths[0])
        for cell, width in zip(rest, widths[1:]):
            line += "  " + cell.rjust(width)
        print(line.rstrip())


# ---------------------------------------------------------------------------------------- pictures
def load_font(path=None):
    """The font of a file; by default DejaVu, which covers more scripts than Pillow's own font."""
    if path:
        with reading(f"--font {path}", "it is not a readable font file"):
            return ImageFont.truetype(path, 11)
    try:
        return ImageFont.truetype("DejaVuSans.ttf", 11)
    except OSError:
        return ImageFont.load_default(11)


def wrap(text, width, font):
    """Lines of `width` pixels: broken at spaces, after hyphens and between CJK characters."""
    cjk = "\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
    lines = []
    for part in re.findall(rf" ?(?:[{cjk}]|[^ {cjk}-]*-|[^ {cjk}-]+)", " ".join(text.split())):
        if lines and font.getlength(lines[-1] + part) <= width:
            lines[-1] += part
        else:
            lines.append(part.strip())
    return lines


def save_image(image, path):
    """Writes a PIL image, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        image.save(unfinished, Image.registered_extensions()[path.suffix.lower()])


def image_grid(images, texts, path, columns=None, titles=(), font=None):
    """Writes N images, uint8 (H, H, 3), as a grid: a text below each, a title left of each row."""
    save_image(draw_grid(images, texts, columns, titles, font), path)


def draw_grid(images, texts, columns=None, titles=(), font=None):
    """The grid of `image_grid` as a PIL image."""
    font = font or load_font()
    columns = min(columns or max(4, math.ceil(len(images)**0.5)), len(images))
    side = max(96, len(images[0]))
    gap = 8
    line = max(14, font.getbbox("A")[3] + 3)            # height of a line of text
    texts = [wrap(text, side, font) for text in texts]
    titles = [wrap(title, 150 if len(title) < 150 else 500, font) for title in titles]
    left = gap
    if titles:
        lengths = [font.getlength(part) for title in titles for part in title]
        left += math.ceil(max(lengths, default=0)) + gap
    rows = []
    for first in range(0, len(images), columns):
        title = titles[first // columns] if titles else []
        below = max(len(text) for text in texts[first:first + columns])
        height = gap + max(side + line * below, line * len(title))
        row = Image.new("RGB", (left + columns * (side + gap), height), "white")
        draw = ImageDraw.Draw(row)
        y = max(0, (side - line * len(title)) // 2)
        draw.multiline_text((gap, y), "\n".join(title), "black", font, spacing=2)
        for column, i in enumerate(range(first, min(first + columns, len(images)))):
            x = left + column * (side + gap)
            image = Image.fromarray(images[i]).resize((side, side), Image.Resampling.NEAREST)
            row.paste(image, (x, 0))
            draw.multiline_text((x, side + 1), "\n".join(texts[i]), "black", font, spacing=2)
        rows.append(np.asarray(row))
    sheet = np.pad(np.concatenate(rows), ((gap, 0), (0, 0), (0, 0)), constant_values=255)
    return Image.fromarray(sheet)


def round_ticks(low, high):
    """Two to seven multiples of 1, 2 or 5 times a power of ten, from low to high."""
    rough = (high - low) / 6
    power = 10.0**math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)                # rounding must not lose a tick at the end
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low, high):
    """For a logarithmic axis: 1, 2 and 5 times each power of ten, or `round_ticks` if too few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return ticks if len(ticks) > 2 else round_ticks(low, high)


CURVE_COLOURS = ["#2c5cd2", "#d6302c", "#34a046", "#963cb0", "#e08a1e", "#555555"]


def plot(curves, path, x_label, y_label, log=False):
    """Draws curves {name: [(x, y), ...]} with axes and a legend. log: plot log y, where y > 0."""
    scale = math.log10 if log else float
    points = {}
    for name, curve in curves.items():
        drawn = [(x, scale(y)) for x, y in curve if math.isfinite(y) and (y > 0 or not log)]
        points[name] = np.array(drawn).reshape(-1, 2)
    every = np.concatenate([np.empty((0, 2)), *points.values()])
    if not len(every):
        return
    low = every.min(0)
    extent = every.max(0) - low
    extent[extent == 0] = 1
    high = low + extent
    left = 64                                           # of the area of the curves, in pixels
    right = 624
    top = 40
    bottom = 320
    sheet = Image.new("RGB", (640, 360), "white")
    draw = ImageDraw.Draw(sheet)
    font = load_font()

    def place(x, y):                                    # rows count from the top
        share = (np.array([x, y]) - low) / extent
        return (left + share[0] * (right - left), bottom + share[1] * (top - bottom))

    y_ticks = log_ticks(10**low[1], 10**high[1]) if log else round_ticks(low[1], high[1])
    for tick in y_ticks:
        _, row = place(low[0], scale(tick))
        draw.line((left, row, right, row), "#dddddd")
        draw.text((left - 6, row), f"{tick:.4g}", "black", font, anchor="rm")
    for tick in round_ticks(low[0], high[0]):
        column, _ = place(tick, low[1])
        draw.line((column, bottom, column, bottom + 4), "#888888")
        draw.text((column, bottom + 6), f"{tick:.6g}", "black", font, anchor="ma")
    draw.line((left, bottom, right, bottom), "#888888")
    draw.text(((left + right) / 2, bottom + 22), x_label, "black", font, anchor="ma")
    draw.text((left, 2), y_label, "black", font)
    legend = left
    for i, (name, curve) in enumerate(points.items()):
        colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
        pixels = [place(x, y) for x, y in curve]
        draw.line(pixels, colour, width=2)
        if len(pixels) < 20:
            for column, row in pixels:
                draw.ellipse((column - 3, row - 3, column + 3, row + 3), colour)
        draw.text((legend, 18), name, colour, font)
        legend += font.getlength(name) + 16
    save_image(sheet, path)
