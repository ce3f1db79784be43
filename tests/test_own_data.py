"""Pictures of one's own, as people have them, and trainings on them that are killed or misled."""
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, run
from PIL import Image

import common
import dsd
import fine_rewards
import llm_adapter
import sur_adapter
import uvit_fusion
from common import UserError
from experiments import own_data
from image_data import BrokenImage, CaptionedImages, load_image


# ------------------------------------------------------------------------------------------ images
def solid(mode, colour):
    return Image.new("RGB", (8, 8), colour).convert(mode)


@pytest.mark.parametrize("name, image, options, seen", [
    ("a.gif", solid("P", "blue"), {}, (0, 0, 255)),
    ("a.gif", Image.new("P", (8, 8)), {"transparency": 0}, (255, 255, 255)),
    ("a.webp", Image.new("RGBA", (8, 8)), {"lossless": True}, (255, 255, 255)),
    ("a.webp", solid("RGB", "red"), {"lossless": True}, (255, 0, 0)),
    ("a.png", solid("RGB", "red"), {"transparency": (255, 0, 0)}, (255, 255, 255)),
    ("a.png", Image.new("1", (8, 8), 1), {}, (255, 255, 255)),
    ("a.tif", solid("CMYK", "red"), {}, (255, 0, 0)),
    ("a.tif", Image.new("LA", (8, 8), (0, 128)), {}, (127, 127, 127)),
    ("a.png", Image.fromarray(np.full((8, 8), 257 * 90, np.uint16)), {}, (90, 90, 90)),
    ("a.jpg", Image.new("YCbCr", (8, 8), (90, 128, 128)), {}, (90, 90, 90)),
    ("a.bmp", solid("L", "#5a5a5a"), {}, (90, 90, 90))])
def test_an_image_of_any_kind_has_the_colours_that_viewers_show(
        tmp_path, name, image, options, seen):
    image.save(tmp_path / name, **options)
    found = load_image(tmp_path / name, 4).astype(int)
    assert np.abs(found - seen).max() <= 2


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_a_film_the_first_image_is_taken(tmp_path, name):
    first, second = solid("RGB", "red"), solid("RGB", "blue")
    options = {} if name == "a.tif" else {"duration": 100}
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    assert np.abs(load_image(tmp_path / name, 4).astype(int) - (255, 0, 0)).max() <= 2


def test_what_is_no_image_or_too_large_to_be_one_is_broken(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "drawing.png").write_text("<svg/>")
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    for path in tmp_path.iterdir():
        with pytest.raises(BrokenImage, match=f"{path.name} cannot be read as an image"):
            load_image(path, 4)


# --------------------------------------------------------------------------------------- trainings
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("script", ["uvit_fusion.py", "fine_rewards.py"])     # kills.py has all
def test_processes_that_are_killed_leave_whole_checkpoints_and_resume_to_the_same_bits(script):
    command = [sys.executable, Path(__file__).parent / "kills.py", "--kills", "2", "--only", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "with the same bits" in ended.stdout, ended


@pytest.mark.parametrize("method, settings", [
    (uvit_fusion, {"dim": 0}), (uvit_fusion, {"depth": 2000}), (uvit_fusion, {"patch": 0}),
    (uvit_fusion, {"steps": 0}), (uvit_fusion, {"betas": (0.9, 1.0)}), (uvit_fusion, {"lr": 0}),
    (uvit_fusion, {"seed": -1}), (uvit_fusion, {"caption_dropout": 7}),
    (sur_adapter, {"layers": 100_000}), (sur_adapter, {"feed_forward": 0}),
    (sur_adapter, {"feed_forward": 10**8}), (sur_adapter, {"images": 0}),
    (sur_adapter, {"heads": 0}), (sur_adapter, {"eta": 0}), (sur_adapter, {"temperature": 0}),
    (sur_adapter, {"noise_weight": 0, "prompt_weight": 0, "llm_weight": 0}),
    (llm_adapter, {"heads": 0}), (llm_adapter, {"width": 0}), (llm_adapter, {"width": 10**8}),
    (llm_adapter, {"steps_2": 0}), (llm_adapter, {"lr_1": 0}), (llm_adapter, {"best": 2}),
    (llm_adapter, {"conv_kernel": 0}), (llm_adapter, {"batch_size": 1}),
    (llm_adapter, {"decoder_blocks": 10**5}),
    (dsd, {"evaluations": 10**8}), (dsd, {"prompts": 10**6}), (dsd, {"negatives": 0}),
    (dsd, {"weight_lr": 0}), (dsd, {"batch_size": 10**9}), (dsd, {"ema": 0}),
    (fine_rewards, {"candidates": 1}), (fine_rewards, {"rank": 0}), (fine_rewards, {"keep": 2}),
    (fine_rewards, {"weights": (0, 0, 0, 0)}), (fine_rewards, {"sample_steps": 10**6}),
    (fine_rewards, {"rounds": 0}), (fine_rewards, {"beta": 0}), (fine_rewards, {"seed": -1})])
def test_settings_that_cannot_be_or_teach_nothing_are_refused(method, settings):
    flag = next(iter(settings)).replace("_", "-")
    with pytest.raises(UserError, match=f"^--{flag}"):
        common.build_config(method.Config, settings)


@pytest.mark.parametrize("script, flags", [
    ("sur_adapter.py", ["--sample-steps", 5]), ("llm_adapter.py", ["--sample-steps", 5]),
    ("llm_adapter.py", ["--font", "a.ttf"])])
def test_flags_of_the_toy_world_are_refused_with_other_data(tmp_path, script, flags):
    refused(run(script, "--train", "--data", "mine", *flags, cwd=tmp_path),
            f"{flags[0]} has no effect here")


# ------------------------------------------------------------------------------------------- emoji

def pack(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))


def webp(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_each_emoji_that_has_an_image_and_a_name_is_an_example(tmp_path):
    pictures = {"assets/2764.webp": webp("red"), "assets/1f7e6.webp": webp("blue"),
                "assets/1f600.webp": webp("yellow")}
    names = [{"hexcode": "2764", "label": "red heart"},
             {"hexcode": "1F7E6", "label": "blue square"},
             {"hexcode": "1F34F", "label": "green apple"}]              # which has no image
    pack(tmp_path / own_data.PICTURES, pictures)
    pack(tmp_path / own_data.NAMES, {"en/data.json": json.dumps(names).encode()})
    folder = own_data.prepare_emoji(tmp_path / "emoji", tmp_path.as_uri())
    captions = {}
    for split in ("train", "val"):
        try:
            dataset = CaptionedImages(folder, split, 8)
        except UserError:                            # two images may fall into the same split
            continue
        for i, (_, texts, _) in enumerate(dataset.items):
            captions[texts[0]] = dataset.image(i).float().mean((1, 2)).argmax().item()
    assert captions == {"red heart": 0, "blue square": 2}
    own_data.prepare_emoji(tmp_path / "emoji", "file:///nowhere")       # once is enough
    with pytest.raises(UserError, match="cannot be downloaded"):
        own_data.prepare_emoji(tmp_path / "other", "file:///nowhere")


def test_photographs_need_a_folder(tmp_path):
    refused(run("experiments.own_data", "photographs", cwd=tmp_path), "--data")
