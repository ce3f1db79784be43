"""The paper's scale in small: published weights, latents, several processes, memory savers, guidance in an interval."""
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_coco, run
from safetensors.torch import load_file
from test_training import TINY, train

import common
import sample
import uvit_fusion
from autoencoder import Autoencoder
from toy import shapes
from uvit_fusion import PRESETS, Diffusion, Settings, UViT, guided


@pytest.fixture(scope="module")
def autoencoder_file(tmp_path_factory):
    """A small autoencoder of random weights: 4 channels, 2 pixels a latent."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("autoencoder") / "autoencoder_kl.pth"
    torch.save(Autoencoder(32, (1, 1), 1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def wide_clip(tmp_path_factory):
    """A CLIP text model of random weights with the width and length of ViT-L/14: 768, 77."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from toy.experts import train_tokenizer
    folder = tmp_path_factory.mktemp("wide_clip")
    tokenizer = train_tokenizer(["a man on a horse"], vocabulary=300, length=77)
    CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12,
                                 max_position_embeddings=77, pad_token_id=0, bos_token_id=2, eos_token_id=3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published(depth, path):
    """A file of the names and shapes of the published checkpoints, with random values."""
    torch.manual_seed(0)
    s = Settings(**PRESETS["coco"] | dict(depth=depth, image_blocks=0, caption_blocks=0))
    torch.save(UViT(s).state_dict(), path)
    return path


@pytest.mark.parametrize("depth", [12, 16])
def test_sample_draws_with_files_of_the_published_names_and_shapes(tmp_path, autoencoder_file, wide_clip, depth):
    weights = published(depth, tmp_path / "mscoco_uvit.pth")
    status, out, errors = run("sample.py", "a green train", "--weights", weights, "--autoencoder", autoencoder_file, "--clip", wide_clip,
                              "--sample-steps", 1, "--guidance", 1, "--device", "cpu", "--singles", cwd=tmp_path)
    assert status == 0, errors
    picture = common.Image.open(tmp_path / "runs" / "mscoco_uvit" / "samples" / "prompts_0000.png")
    assert picture.size == (64, 64)                                                     # latents of 32 x 32, 2 pixels each here
    painter = sample.load_published(weights, autoencoder_file, str(wide_clip), torch.device("cpu"), torch.float32)
    s = painter.settings
    assert (s.depth, s.heads, s.size, s.patch, s.image_blocks, s.caption_blocks, s.mask_text) == (depth, 8, 32, 2, 0, 0, False)
    assert (s.target, s.schedule, s.latent_scale, s.clip_x0) == ("eps", "linear", 0.23010, False)


def test_a_training_starts_from_published_weights_and_new_caption_blocks(tmp_path, coco, clip_folder):
    early = ["--image-blocks", 0, "--caption-blocks", 0, "--init", "published"]
    assert train(tmp_path, coco, clip_folder, *early, steps=2, out="early")[0] == 0
    torch.save(load_file(tmp_path / "early" / "model.safetensors"), tmp_path / "published.pth")
    still = ["--lr", 1e-30, "--muon-lr", 1e-30, "--weight-decay", 0]
    status, out, errors = train(tmp_path, coco, clip_folder, "--init", "published.pth", *still, steps=1, out="fused")
    assert status == 0, errors
    before, after = load_file(tmp_path / "early" / "model.safetensors"), load_file(tmp_path / "fused" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"caption_blocks"}
    status, out, errors = train(tmp_path, coco, clip_folder, "--init", "published.pth", "--patch", 8, steps=1, out="other")
    assert status == 2 and "published.pth" in errors and errors.count("\n") == 1


LATENT = ["--no-clip-x0", "--channels", 4, "--size", 16, "--latent-scale", 0.5]


def test_trains_on_latents_and_draws_pictures(tmp_path, coco, clip_folder, autoencoder_file):
    flags = [*LATENT, "--autoencoder", autoencoder_file]
    status, out, errors = train(tmp_path, coco, clip_folder, *flags, steps=3)
    assert status == 0, errors
    assert np.load(tmp_path / "data" / "latents" / "coco-train-32" / "latents.npy").shape == (12, 2, 4, 16, 16)
    status, out, errors = run("sample.py", "a man", "--run", "run", "--sample-steps", "2", "--singles", cwd=tmp_path)
    assert status == 0 and common.Image.open(tmp_path / "run" / "samples" / "prompts_0000.png").size == (32, 32), errors
    # the same latents serve a second training; those of other data are refused
    before = (tmp_path / "data" / "latents" / "coco-train-32" / "latents.npy").stat().st_mtime_ns
    assert train(tmp_path, coco, clip_folder, *flags, steps=1, out="second")[0] == 0
    assert (tmp_path / "data" / "latents" / "coco-train-32" / "latents.npy").stat().st_mtime_ns == before
    other = make_coco(tmp_path / "other" / "coco", train=14)
    status, out, errors = train(tmp_path, other, clip_folder, *flags, steps=1, out="third")
    assert status == 2 and "coco-train-32" in errors and errors.count("\n") == 1, errors


def test_x_0_of_latents_is_scaled_and_drawn_anew(autoencoder_file):
    s = Settings(channels=4, size=8, latent_scale=0.5, clip_x0=False, autoencoder=str(autoencoder_file))
    painter = uvit_fusion.Painter(None, None, s, None, torch.device("cpu"), torch.float32)
    moments = torch.stack([torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), 2 * np.log(2.0))], dim=1).half()
    noise = torch.randn(1, 4, 8, 8)
    assert torch.allclose(painter.to_x_0(moments, noise), 0.5 * (3 + 2 * noise), atol=2e-3)
    z = torch.randn(1, 4, 8, 8)
    expected = common.to_uint8(painter.autoencoder.decode(z))
    assert np.abs(painter.to_pictures(0.5 * z).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("flags", [["--autoencoder", "nowhere.pth"], ["--channels", 4], ["--init", "nowhere.pth"]])
def test_what_paper_scale_cannot_use_is_refused_in_one_line(tmp_path, coco, clip_folder, flags):
    status, out, errors = train(tmp_path, coco, clip_folder, *flags, steps=1)
    assert status == 2 and errors.count("\n") == 1 and flags[0] in errors and not (tmp_path / "run").exists(), errors


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_bad_weights_are_refused_in_one_line_and_run_no_code(tmp_path, autoencoder_file, wide_clip, monkeypatch):
    def refused(path, *words):
        status, out, errors = run("sample.py", "a man", "--weights", path, "--autoencoder", autoencoder_file, "--clip", wide_clip, cwd=tmp_path)
        assert status == 2 and errors.count("\n") == 1 and all(word in errors for word in (str(path), *words)), errors
    refused("missing.pth", "no file")
    whole = published(12, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:len(whole) // 2])
    refused("cut.pth", "cut off")
    torch.save({"pos_embed": Code()}, tmp_path / "code.pth")
    refused("code.pth", "code")
    assert not (tmp_path / "ran").exists()
    torch.save({"pos_embed": torch.zeros(3)}, tmp_path / "other.pth")
    refused("other.pth", "no U-ViT")
    tensors = torch.load(tmp_path / "whole.pth", weights_only=True)
    torch.save(tensors | {"norm.weight": torch.zeros(7)}, tmp_path / "shapes.pth")
    refused("shapes.pth", "norm.weight")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "tensors")


# ------------------------------------------------------------------------------------------------------- several processes
def torchrun(folder, *flags, ranks=2):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", ROOT / "uvit_fusion.py",
                             "--train", *map(str, flags)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


ADAMW = ["--optimizer", "adamw", "--steps", 4, "--lr", 1e-3, "--warmup", 0]               # Muon rounds to bf16 inside, which would hide a difference


def assert_same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-5), (name, (a[name] - b[name]).abs().max())      # weights move by 1e-3 a step


def test_two_processes_train_the_same_weights_as_one(tmp_path, clip_folder):
    # captions of known scenes: rank 0 looks at its pictures during the training, which the other must not wait for in vain
    data = shapes.build(tmp_path / "scenes", size=16, train=24, val=8)
    flags = ["--data", data, "--clip", clip_folder, *TINY, *ADAMW]
    process = torchrun(tmp_path, *flags, "--out", "two")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert out.count("steps of 4 pictures on cpu x 2") == 1                             # only rank 0 speaks
    status, _, errors = run("uvit_fusion.py", "--train", *flags, "--out", "one", cwd=tmp_path)
    assert status == 0, errors
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert load_file(tmp_path / "one" / "model.safetensors")["norm.weight"].std() > 0     # it did train
    assert (tmp_path / "two" / "early.safetensors").exists()


def test_a_mistake_that_all_processes_make_is_told_once(tmp_path, clip_folder):
    process = torchrun(tmp_path, "--data", "nowhere", "--clip", clip_folder, *TINY, "--out", "run")
    out, errors = process.communicate(timeout=100)
    lines = [line for line in errors.splitlines() if "uvit_fusion.py: error" in line]
    assert process.returncode != 0 and len(lines) == 1 and "nowhere" in lines[0], errors


def test_the_running_average_keeps_no_history(tmp_path, coco, clip_folder):
    s = Settings(size=16, dim=32, depth=4, heads=2, batch=4, steps=2, clip=clip_folder)
    painter = uvit_fusion.train(s, coco, tmp_path / "run", common.Ranks("cpu"), torch.float32)
    assert all(p.is_leaf and not p.requires_grad for p in painter.model.parameters())


def test_a_killed_process_ends_the_others_with_one_line(tmp_path, coco, clip_folder):
    process = torchrun(tmp_path, "--data", coco, "--clip", clip_folder, *TINY, "--steps", 100_000, "--save-every", 5, "--out", "run")
    deadline = time.time() + 120
    while not (tmp_path / "run" / "state.pt").exists() and time.time() < deadline:
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    rank = {child: re.search(r"\0RANK=(\d)", open(f"/proc/{child}/environ").read()) for child in children}
    os.kill(next(int(child) for child, found in rank.items() if found and found[1] == "1"), signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if "uvit_fusion.py: error" in line]
    assert process.returncode != 0 and len(lines) == 1 and "--resume" in lines[0], errors
    assert load_file(tmp_path / "run" / "model.safetensors")


@pytest.mark.parametrize("flags", [["--accumulate", 2], ["--recompute"]])
def test_memory_savers_do_not_change_the_training(tmp_path, coco, clip_folder, flags):
    assert train(tmp_path, coco, clip_folder, *ADAMW, out="plain")[0] == 0
    status, _, errors = train(tmp_path, coco, clip_folder, *ADAMW, *flags, out="saving")
    assert status == 0, errors
    assert_same_weights(tmp_path / "plain", tmp_path / "saving")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, coco, clip_folder):
    status, _, errors = train(tmp_path, coco, clip_folder, "--accumulate", 3)
    assert status == 2 and "--batch 4" in errors and errors.count("\n") == 1


def test_ranks_share_every_batch():
    whole = list(common.Draws(10, 4, 0, 5, seed=1))
    shares = [list(common.Draws(10, 4, 0, 5, seed=1, rank=rank, ranks=2)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*shares)]


# ---------------------------------------------------------------------------------------------------------------- sampling
def test_guidance_interval_guides_inside_and_spares_half_of_the_work_outside():
    torch.manual_seed(0)
    s = Settings(size=8, dim=32, depth=4, heads=2, image_blocks=1, text_dim=16, text_length=5, init="published")
    model, text, mask = UViT(s), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    x, sizes, inner = torch.randn(2, 3, 8, 8), [], model.denoise

    def draw(w, interval):
        sizes.clear()
        model.denoise = lambda x, *more: sizes.append(len(x)) or inner(x, *more)
        with torch.no_grad():
            return Diffusion("cosine", "x0").sample(guided(model, text, mask, -text[:1], mask[:1], w, interval), x, 10)
    assert torch.equal(draw(3.0, (2.0, 3.0)), draw(1.0, (0.0, 1.0))) and set(sizes) == {2}
    whole = draw(3.0, (0.0, 1.0))
    assert set(sizes) == {4}
    part = draw(3.0, (0.3, 0.8))
    assert sizes == [2, 2, 4, 4, 4, 4, 4, 4, 2, 2] and not torch.equal(part, whole)


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
def test_pictures_drawn_in_parts_equal_those_drawn_at_once(tmp_path, coco, clip_folder, sampler):
    assert train(tmp_path, coco, clip_folder, steps=2)[0] == 0
    painter = sample.load_run(tmp_path / "run", "cpu", "fp32")
    prompts = [f"picture {i}" for i in range(5)]
    whole = painter.draw(prompts, steps=3, sampler=sampler)
    parts = [painter.draw(prompts[:2], steps=3, sampler=sampler), painter.draw(prompts[2:], steps=3, sampler=sampler, first=2, batch=2)]
    assert np.abs(whole.astype(int) - np.concatenate(parts)).max() <= 1
