"""Trainings that are killed at random moments, then resumed; run by hand: a few minutes.

    python tests/kills.py                                # 20 kills of each method
    python tests/kills.py --kills 100 --only dsd.py --seed 1

A process trains a tiny network and is killed (SIGKILL, as by a power cut or a lack of memory). What
it leaves must be intact: checkpoints, pictures, JSON. Then it resumes until it is killed again. In
the end its folder must hold exactly what an undisturbed training leaves, to the last bit. The exit
status is 1 if one does not.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import torch
from conftest import make_clip, run
from fuzz import Files, base_commands
from PIL import Image
from tqdm import tqdm

import common

# so many steps that most moments fall into the training, and stages and rounds into each other
STEPS = {
    "uvit_fusion.py": ["--steps", "60"],
    "dsd.py": ["--steps", "60"],
    "llm_adapter.py": ["--steps-1", "40", "--steps-2", "20", "--steps-3", "20"],
    "sur_adapter.py": ["--steps", "60"],
    "fine_rewards.py": ["--steps", "30", "--rounds", "2"],
}


def start(script, flags, cwd):
    """Runs main() of a script in its own process; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        # many more checkpoints than usual, so that some kills hit while one is written
        common.Run.due = lambda run, step: step % 2 == 0 or step == run.steps
        status, _, errors = run(script, *flags, cwd=cwd)
        if status:
            print(errors[-500:], file=sys.stderr)
    finally:
        os._exit(status)


def finish(process, seconds=None):
    """Waits for a process to end, or kills it after some seconds; returns whether it did."""
    end = time.monotonic() + (seconds or 1e9)
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            assert status == 0, f"the training ended with status {status}"
            return False
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def check_whole(folder):
    """Fails if a file of a run folder is broken. Returns whether there is a checkpoint."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            assert not zipfile.ZipFile(path).testzip(), path
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            common.load_file(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
    states = list(folder.rglob("state.pt"))
    assert all((state.parent / "model.safetensors").exists() for state in states)
    return bool(states)


def without_tensors(state):
    """A state with bytes in place of tensors, so that it can be compared."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, dict):
        return {name: without_tensors(value) for name, value in state.items()}
    return list(map(without_tensors, state)) if isinstance(state, (list, tuple)) else state


def contents(folder):
    """What a training leaves that depends on neither time nor kills, {name: content}."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pt":                     # a pickle can write the same in two ways
            found[name] = without_tensors(torch.load(path, weights_only=True))
        elif path.name == "metrics.csv":             # a mean may be of fewer steps after a kill
            found[name] = [line.split(",")[0] for line in path.read_text().splitlines()]
        elif path.is_file() and path.name not in ("results.json", "loss.png"):
            found[name] = path.read_bytes()
    return found


def commands(folder):
    """{method's script: flags of a tiny training}; the folder gets what they need."""
    warnings.simplefilter("ignore")
    # a lock that another thread holds when the process is forked stays locked in the new one
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    # tqdm's own lock is shared by all processes: one killed while holding it locks out the rest
    tqdm.set_lock(threading.RLock())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clip = make_clip(folder / "clip")
    Files(folder, clip)
    found = base_commands(folder, clip)
    return {script: [flag for flag in found[script] if flag != "--overwrite"] + more
            for script, more in STEPS.items()}


def kill_and_resume(script, flags, folder, kills, rng):
    """Trains until `kills` kills have hit a training; returns how many trainings finished.

    Each of these must leave the same bits as an undisturbed one.
    """
    begin = time.monotonic()
    assert not finish(start(script, [*flags, "--out", "whole"], folder))
    seconds = time.monotonic() - begin
    expected = contents(folder / "whole")
    trained = 0
    killed = 0
    checkpoint = False
    while not trained or killed < kills or checkpoint:
        resume = ["--resume"] if checkpoint else []
        process = start(script, [*flags, "--out", "killed", *resume], folder)
        if finish(process, rng.uniform(0.1, 1) * seconds if killed < kills else None):
            killed += 1
            whole = check_whole(folder / "killed")
            assert whole or not checkpoint, "the checkpoint is gone"
            checkpoint = whole
            continue
        found = contents(folder / "killed")
        differ = [name for name in expected | found if expected.get(name) != found.get(name)]
        assert not differ, f"differs from an undisturbed training: {differ}"
        trained += 1
        checkpoint = False
        shutil.rmtree(folder / "killed")
    return trained


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills of each method")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--only", default="", help="one script")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for script, flags in commands(Path(folder)).items():
            if args.only not in script:
                continue
            try:
                trained = kill_and_resume(script, flags, Path(folder), args.kills, rng)
                outcome = f"{trained} trainings ended with the same bits"
            except Exception as error:
                failed = True
                outcome = f"{type(error).__name__}: {error}"
            print(f"{script}: {args.kills} kills, {outcome}", flush=True)
            for name in ("whole", "killed"):
                shutil.rmtree(Path(folder, name), ignore_errors=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
