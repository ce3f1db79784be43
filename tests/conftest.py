"""Small things that the tests share: a random CLIP in the real format, COCO folders made on the spot, a run of a script."""
import contextlib
import importlib
import io
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import common  # noqa: E402


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights, saved as a real one is."""
    from transformers import CLIPConfig, CLIPModel

    from toy.experts import train_tokenizer
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["two red circles above a blue square", "a man on a horse"], vocabulary=300, length=16)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    words = dict(vocab_size=len(tokenizer), max_position_embeddings=16, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    config = CLIPConfig(text_config=tower | words, vision_config=tower | dict(image_size=24, patch_size=8), projection_dim=32)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_coco(root, year="2017", train=12, val=4):
    """A folder in the layout of MS-COCO: JPEGs of several sizes, a grey-scale and a CMYK one among them, five captions each."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        folder = root / f"{split}{year}"
        folder.mkdir()
        images, notes = [], []
        for i in range(count):
            height, width = ((480, 640), (640, 427), (120, 90), (33, 50))[i % 4]
            coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
            name = f"COCO_{split}2014_{i:012d}.jpg" if year == "2014" else f"{i:012d}.jpg"
            coarse.convert({1: "L", 2: "CMYK"}.get(i, "RGB")).save(folder / name)
            images.append({"id": 10 + i, "file_name": name, "width": width, "height": height})
            notes += [{"id": 5 * i + k, "image_id": 10 + i, "caption": f" picture {i} told\nin way {k} "} for k in range(5)]
        random.Random(0).shuffle(notes)
        (root / "annotations" / f"captions_{split}{year}.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return root


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "coco")


def run(script, *flags, cwd):
    """Runs a script's main() as its command line would, in this process (which spares the imports); returns (exit status, output, errors)."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    before, argv = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            common.entry(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as stop:
        status = stop.code
    finally:
        os.chdir(before)
        sys.argv = argv
    return status, out.getvalue(), errors.getvalue()
