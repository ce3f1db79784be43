"""sample.py: any run, any prompts, one grid; the same seed gives the same images."""
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import refused, run, save_run, tiny_pipeline
from PIL import Image

import common
import sample
import uvit_fusion
from autoencoder import Autoencoder

DEVICE = ("--device", "cpu", "--precision", "fp32")
FEW = ("--sample-steps", 2, *DEVICE)


@pytest.fixture
def folder(tmp_path, pipeline):
    """A working folder with a run of uvit_fusion.py in its usual place."""
    save_run(pipeline, tmp_path / "runs" / "uvit_fusion")
    return tmp_path


def grid(folder, name="prompts.png"):
    return np.asarray(Image.open(folder / "runs" / "uvit_fusion" / "samples" / name))


def test_prompts_become_a_grid_in_the_run_folder(folder):
    status, out, errors = run("sample.py", "two red circles", "a horse", *FEW, cwd=folder)
    assert status == 0, errors
    assert out.splitlines()[-1] == "2 images: runs/uvit_fusion/samples/prompts.png"
    assert grid(folder).shape[1] > 2 * 96                        # side by side
    first = grid(folder)
    run("sample.py", "two red circles", "a horse", *FEW, cwd=folder)
    assert np.array_equal(grid(folder), first)
    run("sample.py", "two red circles", "a horse", *FEW, "--noise-seed", 1, cwd=folder)
    assert not np.array_equal(grid(folder), first)


def test_prompts_come_from_the_command_line_and_a_file(folder, monkeypatch):
    (folder / "prompts.txt").write_text("\ufeffa blue square\n\n  a man  \n", encoding="utf-8")
    prompts = []
    monkeypatch.setattr(uvit_fusion.Pipeline, "generate", lambda self, texts, **_: (
        prompts.extend(texts), np.zeros((len(texts), 8, 8, 3), np.uint8))[1])
    flags = ["a horse", "--file", "prompts.txt", "--per-prompt", 2]
    status, _, errors = run("sample.py", *flags, *DEVICE, cwd=folder)
    assert status == 0, errors
    assert prompts == [prompt for prompt in ("a horse", "a blue square", "a man")
                       for _ in range(2)]
    assert grid(folder).shape[1] < 3 * 96                        # a row per prompt


def test_each_image_is_the_one_that_its_prompt_gives_with_the_flags(folder, pipeline):
    flags = ["--sample-steps", 3, "--guidance", 2, "--guidance-interval", 0.5, 1, "--sampler",
             "ddim", "--negative-prompt", "a horse", "--noise-seed", 5, "--singles", *DEVICE]
    status, _, errors = run("sample.py", "a man", "a square", *flags, cwd=folder)
    assert status == 0, errors
    expected = pipeline.generate(
        ["a man", "a square"], steps=3, guidance=2, guidance_interval=(0.5, 1), sampler="ddim",
        negative_prompt="a horse", seed=5)
    for i in range(2):
        assert np.abs(grid(folder, f"prompts_{i:04d}.png").astype(int) - expected[i]).max() <= 1


def test_a_compiled_network_draws_the_same(folder, monkeypatch):
    compiled = []

    def stand_in(network, **options):
        compiled.append(network)
        return network
    run("sample.py", "two red circles", *FEW, cwd=folder)
    first = grid(folder)
    monkeypatch.setattr(torch, "compile", stand_in)
    status, _, errors = run("sample.py", "two red circles", "--compile", *FEW, cwd=folder)
    assert status == 0, errors
    assert compiled[-1].__name__ == "denoise" and np.array_equal(grid(folder), first)


def test_a_trajectory_shows_every_step_of_every_image(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(common, "image_grid", lambda *args, **kwargs: calls.append((args, kwargs)))
    flags = ["--trajectory", "--sample-steps", 3, *DEVICE]
    status, _, errors = run("sample.py", "a man", "a square", *flags, cwd=folder)
    assert status == 0, errors
    (frames, labels, _, columns), kwargs = calls[0]
    assert labels == ["step 1", "step 2", "step 3"] * 2 and columns == 3
    assert kwargs["titles"] == ["a man", "a square"]
    pipeline = sample.load_run(folder / "runs" / "uvit_fusion", "cpu", "fp32")
    images = pipeline.generate(["a man", "a square"], steps=3)   # where the trajectories end
    assert np.array_equal(frames[2], images[0]) and np.array_equal(frames[5], images[1])


def test_a_trajectory_becomes_a_film_if_the_file_is_a_gif(folder):
    flags = ["--trajectory", "--sample-steps", 3, "--out", "film.gif", *DEVICE]
    status, out, errors = run("sample.py", "a man", "a square", *flags, cwd=folder)
    assert status == 0, errors
    assert out.splitlines()[-1] == "2 images: film.gif"
    film = Image.open(folder / "film.gif")
    frames = []
    for step in range(film.n_frames):
        film.seek(step)
        frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert len(frames) == 3 and frames[0].shape[1] > 2 * 96              # side by side
    last, *_ = sample.load_run(folder / "runs" / "uvit_fusion", "cpu", "fp32").generate(
        ["a man"], steps=3)
    shown = frames[2][8:104, 8:104].reshape(8, 12, 8, 12, 3).mean((1, 3))
    assert np.abs(shown - last).mean() < 8                               # a GIF has 256 colours
    assert np.abs(frames[0] - frames[2]).mean() > 1


@pytest.mark.parametrize("name, values, options", [
    ("guidance", [1, 8], [{"guidance": 1}, {"guidance": 8}]),
    ("sampler", ["ddim", "dpm"], [{"sampler": "ddim"}, {"sampler": "dpm"}]),
    ("sample-steps", [1, 3], [{"steps": 1}, {"steps": 3}]),
])
def test_a_flag_is_varied_row_by_row_from_the_same_noise(
        folder, pipeline, monkeypatch, name, values, options):
    calls = []
    monkeypatch.setattr(common, "image_grid", lambda *args, **kwargs: calls.append((args, kwargs)))
    prompts = ["a man", "a square"]
    flags = [] if name == "sample-steps" else ["--sample-steps", 2]
    status, out, errors = run("sample.py", *prompts, "--vary", name, *values, *flags,
                              "--noise-seed", 3, *DEVICE, cwd=folder)
    assert status == 0 and "4 images" in out, errors
    (images, texts, _, columns), kwargs = calls[0]
    assert columns == 2 and texts == ["", "", *prompts]
    assert kwargs["titles"] == [f"{name} {value}" for value in values]
    for row, own in enumerate(options):
        expected = pipeline.generate(prompts, seed=3, **{"steps": 2} | own)
        assert np.abs(np.stack(images[2 * row:2 * row + 2]).astype(int) - expected).max() <= 1


def test_the_run_is_varied_too(folder, clip_folder, monkeypatch):
    other = tiny_pipeline(clip_folder, seed=1)
    save_run(other, folder / "runs" / "other")
    calls = []
    monkeypatch.setattr(common, "image_grid", lambda *args, **kwargs: calls.append(args))
    flags = ["--vary", "run", "runs/uvit_fusion", "runs/other"]
    status, _, errors = run("sample.py", "a man", *flags, *FEW, cwd=folder)
    assert status == 0, errors
    first, second = calls[0][0]
    assert np.abs(second.astype(int) - other.generate(["a man"], steps=2)[0]).max() <= 1
    assert np.abs(second.astype(int) - first).max() > 1


def test_a_run_is_loaded_by_the_method_that_its_config_names(folder, monkeypatch):
    loaded = []
    for method in sample.METHODS:
        module = type(sys)(method)
        module.load_pipeline = lambda *args, method=method: loaded.append((method, *args))
        monkeypatch.setitem(sys.modules, method, module)
        common.write_json(folder / "config.json", {"method": method})
        sample.load_run(folder / "step1400.safetensors", "cpu", "fp32")
    assert loaded == [(method, folder / "step1400.safetensors", torch.device("cpu"), torch.float32)
                      for method in ("uvit_fusion", "llm_adapter", "sur_adapter", "fine_rewards")]


def test_a_run_is_drawn_from_anywhere_and_its_text_encoder_can_be_named(
        folder, pipeline, clip_folder, tmp_path):
    shutil.copytree(clip_folder, folder / "runs" / "clip")
    pipeline.cfg.clip = "runs/clip"
    save_run(pipeline, folder / "runs" / "uvit_fusion")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ["a man", "--run", folder / "runs" / "uvit_fusion", *FEW]
    status, _, errors = run("sample.py", *flags, cwd=elsewhere)
    assert status == 0, errors
    shutil.move(folder / "runs" / "clip", elsewhere / "moved")
    refused(run("sample.py", *flags, cwd=elsewhere), "--clip runs/clip")
    status, _, errors = run("sample.py", *flags, "--clip", "moved", cwd=elsewhere)
    assert status == 0, errors


def test_an_adapter_is_put_behind_the_text_encoder_of_the_run(folder, monkeypatch):
    module = type(sys)("sur_adapter")
    attached = []
    module.attach = lambda pipeline, path: attached.append(path) or pipeline
    monkeypatch.setitem(sys.modules, "sur_adapter", module)
    status, _, errors = run("sample.py", "a man", "--adapter", "runs/a", *FEW, cwd=folder)
    assert status == 0 and attached == ["runs/a"], errors


def test_published_weights_need_no_run(tmp_path, clip_folder, monkeypatch):
    # early fusion under the published names, with 8 x 8 latents of a small autoencoder
    published = tiny_pipeline(clip_folder, channels=4, image_blocks=0, caption_blocks=0, depth=6,
                              mask_text=False, schedule="linear", target="eps", clip_x0=False)
    torch.save(published.model.state_dict(), tmp_path / "small.pth")
    vae = Autoencoder((32, 32), blocks=1)
    common.save_tensors(vae.state_dict(), tmp_path / "vae.safetensors")
    sizes = dict(size=8, patch=4, dim=32, heads=2, text_dim=32, text_length=16)
    monkeypatch.setitem(uvit_fusion.PRESETS, "coco", uvit_fusion.PRESETS["coco"] | sizes)
    flags = ["--weights", "small.pth", "--clip", clip_folder, *FEW]
    status, out, errors = run("sample.py", "a man", *flags, "--autoencoder", "vae.safetensors",
                              "--singles", cwd=tmp_path)
    assert status == 0, errors
    image = Image.open(tmp_path / "runs" / "small" / "samples" / "prompts_0000.png")
    assert image.size == (16, 16)
    published.vae = vae.eval()
    published.cfg.guidance_interval = (0.0, 1.0)
    expected = published.generate(["a man"], steps=2, guidance=2.0, sampler="dpm")[0]
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2
    refused(run("sample.py", "a man", *flags, cwd=tmp_path), "--autoencoder")


@pytest.mark.parametrize("flags, word", [
    (["--run", "nowhere"], "train one first"),
    (["--file", "nowhere.txt"], "nowhere.txt"),
    (["--file", "blank.txt"], "--file blank.txt holds no prompt"),
    (["--out", "grid.doc"], "--out grid.doc"),
    (["--out", "blank.txt/grid.png", "--run", "nowhere"], "--out blank.txt/grid.png: File exists"),
    (["--clip", "./some"], "--clip ./some"),
    (["--font", "nowhere.ttf"], "--font nowhere.ttf"),
    (["--sample-steps", 1001], "--sample-steps"),
    (["--guidance", "nan"], "--guidance"),
    (["--guidance", "inf"], "--guidance"),
    (["--guidance-interval", 1, 0], "--guidance-interval 1 0: both are shares"),
    (["--guidance-interval", 60, 100], "--guidance-interval 60 100: both are shares"),
    (["--noise-seed", "9" * 5000], "999 is not an integer from"),
    (["--file", "latin.txt"], "latin.txt, line 2: not in UTF-8"),
    (["\udcff"], "UTF-8"),
    (["--run", "broken"], "gives nan, not images"),
    (["--run", "other"], "names the method 'gan'"),
    (["--run", "other", "--weights", "small.pth"], "--weights and --run both"),
    (["--vary", "guidance"], "--vary guidance: expected one of guidance, sampler"),
    (["--vary", "font", 1], "--vary font 1: expected one of guidance"),
    (["--vary", "guidance", "much"], "--guidance: invalid finite value: 'much'"),
    (["--vary", "sampler", "euler"], "--sampler: invalid choice: 'euler'"),
    (["--vary", "guidance", 1, "--guidance", 2], "--guidance: --vary sets its values"),
    (["--vary", "guidance", 1, "--trajectory"], "--trajectory and --vary"),
])
def test_a_slip_is_one_line(folder, pipeline, flags, word):
    pipeline.model.decoder_pred.bias[0] = torch.nan
    save_run(pipeline, folder / "broken")
    (folder / "latin.txt").write_bytes(b"a man\na caf\xe9\n")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "other").mkdir()
    common.write_json(folder / "other" / "config.json", {"method": "gan"})
    prompts = [] if "blank.txt" in flags else ["a man"]
    refused(run("sample.py", *prompts, *flags, *DEVICE, cwd=folder), word)
