"""Emoji from a package registry become a folder to train on."""
import io
import json
import tarfile

import pytest
from conftest import refused, run
from PIL import Image

from common import UserError
from experiments import own_data
from image_data import CaptionedImages


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
