"""A run from end to end, as a user types it: both COCO layouts, resuming, drawing, and what happens to bad input."""
import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_coco, run
from PIL import Image
from safetensors.torch import load_file, save_file

import common

TINY = ["--dim", "32", "--depth", "4", "--heads", "2", "--image-blocks", "1", "--caption-blocks", "1", "--batch", "4", "--size", "16",
        "--precision", "fp32", "--device", "cpu"]


def train(folder, data, clip, *more, steps=6, out="run"):
    return run("uvit_fusion.py", "--train", "--data", data, "--clip", clip, "--steps", steps, "--out", out, *TINY, *more, cwd=folder)


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_trains_on_the_real_coco_layouts_and_draws(tmp_path, clip_folder, year):
    coco = make_coco(tmp_path / "coco", year)
    status, out, errors = train(tmp_path, coco, clip_folder, steps=4)
    assert status == 0, errors
    for name in ("config.json", "model.safetensors", "state.pt", "metrics.csv", "loss.png", "samples/validation.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert not list(tmp_path.rglob("*.unfinished*"))
    status, out, errors = run("sample.py", "a man on a horse", "--run", "run", "--sample-steps", "2", "--singles", cwd=tmp_path)
    assert status == 0, errors
    assert Image.open(tmp_path / "run" / "samples" / "prompts_0000.png").size == (16, 16)
    status, out, errors = run("sample.py", "a man", "a horse", "--run", "run", "--sample-steps", "3", "--film", cwd=tmp_path)
    assert status == 0 and (tmp_path / "run" / "samples" / "film.png").exists(), errors


def test_loader_gives_each_picture_once_an_epoch_with_changing_captions(coco):
    dataset = common.CaptionedImages(coco, "train", 32)
    assert len(dataset) == 12 and all(len(texts) == 5 for _, texts, _ in dataset.items)
    steps = list(common.batches(dataset, 4, 0, 6, seed=0))
    seen = [caption.split(" told")[0] for _, captions, _ in steps for caption in captions]
    assert len(set(seen[:12])) == len(set(seen[12:])) == 12 and seen[:12] != seen[12:]
    assert len({caption for _, captions, _ in steps for caption in captions}) > 14
    assert all(pictures.shape == (4, 3, 32, 32) and pictures.dtype == torch.uint8 for pictures, _, _ in steps)


def test_loader_gives_the_same_with_worker_processes(coco):
    dataset = common.CaptionedImages(coco, "train", 32)
    alone, together = list(common.batches(dataset, 4, 2, 5, 1, workers=0)), list(common.batches(dataset, 4, 2, 5, 1, workers=2))
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(alone, together))


def test_draft_mode_changes_little(coco):
    for name in ("000000000000.jpg", "000000000001.jpg", "000000000002.jpg"):
        path = coco / "train2017" / name
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        # the middle of what the decoder gives is the picture's own but for a pixel
        x, y = (1 if more else 0 for more in (left, top))
        plain = [image.resize((32, 32), Image.Resampling.LANCZOS, box=(left - x * d, top - y * d, left - x * d + side, top - y * d + side))
                 for d in (0, 1)]
        assert min(np.abs(common.load_picture(path, 32).astype(float) - np.asarray(some)).mean() for some in plain) < 2


def test_a_picture_that_a_camera_turned_is_turned_back(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize((90, 60), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6                                                                    # shown turned by a quarter
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "upright.jpg", quality=95)
    turned, straight = (common.load_picture(tmp_path / f"{name}.jpg", 32).astype(float) for name in ("turned", "upright"))
    assert np.abs(turned - straight).mean() < 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory knows glibc only")
def test_memory_that_was_freed_is_used_again():
    code = """if True:
        import resource, sys, torch, common
        if sys.argv[1:]:
            common.keep_memory()
        def faults():
            torch.zeros(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seen = [faults() for _ in range(8)]
        print(seen[-1] - seen[2])"""                                                     # the first ones have to find room
    fresh, *kept = (int(subprocess.run([sys.executable, "-c", code, *flag], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
                    for flag in ((), ("kept",), ("kept",), ("kept",)))
    assert 10 * min(kept) < fresh                                                        # one process in some dozens gained nothing


def test_a_folder_of_pictures_with_texts_loads(tmp_path):
    for i in range(25):
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"picture {i}\n")
    assert len(common.CaptionedImages(tmp_path, "train", 16)) == 23 and len(common.CaptionedImages(tmp_path, "val", 16)) == 2


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, coco, clip_folder, monkeypatch):
    assert train(tmp_path, coco, clip_folder, out="whole")[0] == 0
    # a second run gets a Ctrl-C in its third step
    lerp, calls = torch._foreach_lerp_, []

    def interrupting(*args):
        lerp(*args)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(torch, "_foreach_lerp_", interrupting)
    status, out, errors = train(tmp_path, coco, clip_folder, out="parts")
    assert status == 130 and "--resume" in out, errors
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 3
    status, out, errors = train(tmp_path, coco, clip_folder, "--resume", out="parts")
    assert status == 0, errors
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part]), part
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, clip_folder):
    """A finished run of a few steps, to be broken in many ways."""
    folder = tmp_path_factory.mktemp("finished")
    make_coco(folder / "coco")
    status, _, errors = train(folder, "coco", clip_folder, steps=2)
    assert status == 0, errors
    return folder


def refused(result, *words):
    """One clear line, exit status 2, no traceback."""
    status, out, errors = result
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in errors, errors
    assert all(str(word) in lines[0] for word in words), lines[0]


def damage(coco, how):
    notes = coco / "annotations" / "captions_train2017.json"
    if how == "no folder":
        shutil.rmtree(coco)
    elif how == "no annotations":
        notes.unlink()
    elif how == "cut off":
        notes.write_text(notes.read_text()[:200])
    elif how == "not captions":
        notes.write_text(json.dumps({"images": [], "annotations": [{"bbox": []}]}))
    elif how == "no pictures":
        shutil.rmtree(coco / "train2017")
    elif how == "pictures missing":
        (coco / "train2017" / "000000000000.jpg").unlink()
    elif how == "all broken":
        for path in (coco / "train2017").iterdir():
            path.write_bytes(path.read_bytes()[:100])
    elif how == "blank captions":
        content = json.loads(notes.read_text())
        for note in content["annotations"]:
            note["caption"] = "  \n"
        notes.write_text(json.dumps(content))


@pytest.mark.parametrize("how, words", [
    ("no folder", ["--data", "coco"]), ("no annotations", ["captions_train2017.json"]), ("cut off", ["captions_train2017.json", "JSON"]),
    ("not captions", ["captions_train2017.json"]), ("no pictures", ["train2017"]), ("pictures missing", ["000000000000.jpg"]),
    ("blank captions", ["--data", "no picture"])])
def test_bad_data_is_refused_in_one_line(coco, how, words):
    damage(coco, how)
    with pytest.raises(common.UserError) as error:
        common.CaptionedImages(coco, "train", 16)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_data_leaves_no_run_behind(tmp_path, coco, clip_folder):
    damage(coco, "cut off")
    refused(train(tmp_path, coco, clip_folder), "captions_train2017.json")
    assert not (tmp_path / "run").exists()


def test_a_broken_picture_among_many_is_replaced_and_counted(tmp_path, capsys):
    for i in range(220):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")
        (tmp_path / f"{i:03d}.txt").write_text(f"picture {i}")
    (tmp_path / "007.png").write_bytes(b"\x89PNG broken")
    dataset = common.CaptionedImages(tmp_path, "train", 16)
    broken = common.BrokenPictures(len(dataset))
    for pictures, _, paths in common.batches(dataset, 11, 0, 40, seed=0):
        broken.add(paths)
        assert len(pictures) == 11
    assert len(broken.paths) == 1 and capsys.readouterr().out.count("007.png") == 1
    for i in (8, 9, 11):
        (tmp_path / f"{i:03d}.png").write_bytes(b"")
    dataset.cache.clear()
    with pytest.raises(common.UserError, match="more than 1 %"):
        for _, _, paths in common.batches(dataset, 11, 0, 40, seed=0):
            broken.add(paths)


def test_all_pictures_broken_stops_the_run(tmp_path, coco, clip_folder):
    damage(coco, "all broken")
    refused(train(tmp_path, coco, clip_folder), "cannot be read")
    refused(train(tmp_path, coco, clip_folder, "--workers", 1), "cannot be read")


def test_a_long_caption_is_cut_with_one_warning(clip_folder, capsys):
    encoder = common.TextEncoder(clip_folder)
    features, mask = encoder(["word " * 100, "", "word " * 90])
    assert features.shape == (3, 16, 32) and mask.sum(1).tolist() == [16, 2, 16]
    assert encoder.cut == 2 and capsys.readouterr().out.count("cut off") == 1


@pytest.mark.parametrize("caption, said", [("word " * 100, True), ("two red circles", False)])
def test_a_training_says_how_many_captions_were_cut(tmp_path, coco, clip_folder, caption, said):
    notes = coco / "annotations" / "captions_train2017.json"
    content = json.loads(notes.read_text())
    for note in content["annotations"]:
        note["caption"] = caption
    notes.write_text(json.dumps(content))
    status, out, errors = train(tmp_path, coco, clip_folder, "--drop", 0, steps=3)                          # three steps of four
    assert status == 0 and ("\n12 of the captions" in out and "longer than 16 tokens" in out) == said and ("of the captions" in out) == said, errors


@pytest.mark.parametrize("flags, words", [
    (["--preset", "huge"], ["--preset huge", "toy"]), (["--size", "18"], ["--size 18", "multiple"]), (["--fusion", "late"], ["--fusion late"]),
    (["--clip", "nowhere"], ["--clip nowhere"]), (["--device", "tpu"], ["--device tpu"]), (["--channels", "4"], ["--channels 4"]),
    (["--batch", "0"], ["--batch"]), (["--steps", "0"], ["--steps"]), (["--lr", "-1"], ["--lr"])])
def test_bad_flags_are_refused_in_one_line(finished, clip_folder, flags, words):
    refused(train(finished, "coco", clip_folder, *flags, out="other"), *words)
    assert not (finished / "other").exists()


def test_a_run_is_not_overwritten_by_mistake(finished, clip_folder):
    refused(train(finished, "coco", clip_folder), "run/", "--resume", "--overwrite")
    refused(train(finished, "coco", clip_folder, "--resume", steps=9), "steps = 2", "now it is 9")
    refused(train(finished, "coco", clip_folder, "--resume", out="nothing"), "--resume", "state.pt")


def test_bad_checkpoints_are_refused_in_one_line(finished, tmp_path):
    def sample(folder, *flags):
        return run("sample.py", "a horse", "--run", folder, "--sample-steps", "2", *flags, cwd=finished)
    refused(sample("nowhere"), "nowhere", "--train")
    copy = shutil.copytree(finished / "run", tmp_path / "run")
    refused(sample(copy / "early.safetensors"), "early.safetensors")
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"pos_embed": weights["pos_embed"][:, 1:].contiguous()}, copy / "model.safetensors")
    refused(sample(copy), "model.safetensors", "pos_embed")
    (copy / "model.safetensors").write_bytes((finished / "run" / "model.safetensors").read_bytes()[:1000])
    refused(sample(copy), "model.safetensors", "damaged")
    (copy / "config.json").write_text("{")
    refused(sample(copy), "config.json")
    (copy / "config.json").write_text('{"method": "os"}')
    refused(sample(copy), "config.json", "os")
    refused(sample(finished / "run", "--sampler", "euler"), "--sampler euler")
    refused(sample(finished / "run", "--font", "nofont.ttf"), "nofont.ttf")
    refused(run("sample.py", "--file", "none.txt", "--run", finished / "run", cwd=finished), "none.txt")
    refused(run("eval.py", "--run", finished / "run", cwd=finished), "scenes")


def test_state_files_never_run_code(finished, clip_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch evil",)
    copy = shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("*.unfinished"))
    torch.save({"model": Evil()}, copy / "run" / "state.pt")
    refused(train(copy, "coco", clip_folder, "--resume", steps=2), "state.pt")
    assert not (copy / "evil").exists()


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(tmp_path, coco, clip_folder):
    refused(train(tmp_path, coco, clip_folder, "--lr", "1e30", "--clip-grad", "0", "--warmup", "0", steps=40), "loss")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_every_script_without_an_action_prints_its_help(tmp_path):
    for script in ("uvit_fusion.py", "sample.py"):
        status, out, _ = run(script, cwd=tmp_path)
        assert status == 0 and "--run" in out


def readme_commands():
    """Each line of the README's code blocks that runs one of the project's scripts."""
    lines = [line.split("  #")[0].strip() for block in (ROOT / "README.md").read_text().split("```")[1::2] for line in block.splitlines()]
    found = (re.search(r"(?:python|torchrun --nproc_per_node \d+) (\w+\.py.*)", line) for line in lines if not line.startswith("#"))
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_in_the_readme_parses(command, monkeypatch):
    class Parsed(Exception):
        pass
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self):
        parse(self)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    script, *flags = shlex.split(command)
    with pytest.raises(Parsed):
        run(script, *flags, cwd=ROOT)


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--seeds", "0"], ["--save-every", "none"], ["--workers", "-1"]])
def test_flags_out_of_range_are_refused_by_name(tmp_path, flags):
    refused(run("uvit_fusion.py", "--compare", *flags, cwd=tmp_path), flags[0])


def test_an_output_that_cannot_be_written_is_one_line(finished):
    (finished / "file").write_text("")
    refused(run("sample.py", "a horse", "--run", "run", "--sample-steps", "2", "--out", "file/grid.png", cwd=finished), "file")


def test_a_model_that_is_no_clip_is_refused(tmp_path, clip_folder):
    from transformers import AutoTokenizer, BertConfig, BertModel
    BertModel(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="--clip"):
        common.TextEncoder(tmp_path)
