"""What the tests share: a random CLIP in the real format, small data sets, a tiny U-ViT, a run."""
import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

# with tiny tensors, threads that wait for each other only cost time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

# a tiny U-ViT, as fields of uvit_fusion.Config and as flags of `uvit_fusion.py --train`
TINY_CFG = dict(size=8, patch=4, dim=32, depth=4, heads=2, image_blocks=1, caption_blocks=1,
                batch_size=4, warmup=1, ema=0.9)
TINY = []
for field, default in TINY_CFG.items():
    TINY += [f"--{field.replace('_', '-')}", str(default)]


def make_clip(folder):
    """The folder of a random CLIP, in the real format: 32 features, 16 tokens, 24 x 24 pixels."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from toy.models import train_tokenizer
    texts = ["two red circles above a blue square", "a man on a horse"]
    tokenizer = train_tokenizer(texts, vocabulary=300, length=16)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=16, pad_token_id=0,
                bos_token_id=2, eos_token_id=3)
    vision = dict(image_size=24, patch_size=8)
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=32)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


def make_llm(folder, seed=0):
    """The folder of a Llama with random weights, in the real format: 16 features, 2 layers."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from toy.models import train_tokenizer
    torch.manual_seed(seed)
    LlamaModel(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2)).save_pretrained(folder)
    train_tokenizer(["a man on a horse"], 300, 64).save_pretrained(folder)
    return str(folder)


def make_coco(root, year="2017", train=12, val=4):
    """A folder like MS-COCO: JPEGs of several sizes, one grey, one CMYK, five captions each."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        folder = root / f"{split}{year}"
        folder.mkdir()
        images, notes = [], []
        for i in range(count):
            height, width = ((480, 640), (640, 427), (120, 90), (33, 50))[i % 4]
            coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            image = coarse.resize((width, height), Image.Resampling.BICUBIC)
            name = f"COCO_{split}2014_{i:012d}.jpg" if year == "2014" else f"{i:012d}.jpg"
            image.convert({1: "L", 2: "CMYK"}.get(i, "RGB")).save(folder / name)
            images.append({"id": 10 + i, "file_name": name, "width": width, "height": height})
            for k in range(5):
                caption = f" picture {i} told\nin way {k} "
                notes.append({"id": 5 * i + k, "image_id": 10 + i, "caption": caption})
        random.Random(0).shuffle(notes)
        content = {"images": images, "annotations": notes}
        (root / "annotations" / f"captions_{split}{year}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "coco")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A toy world of 200 scenes for training, 64 for validation, 24 x 24 pixels; read only."""
    from toy import shapes
    return shapes.build(tmp_path_factory.mktemp("data") / "shapes", train=200, val=64)


def tiny_cfg(clip_folder, **changes):
    """The settings of a tiny U-ViT: 8 x 8 pixels, four tokens of an image, five blocks."""
    import uvit_fusion
    fields = TINY_CFG | dict(text_dim=32, text_length=16, clip=clip_folder, steps=4) | changes
    return uvit_fusion.Config(**fields)


def tiny_pipeline(clip_folder, seed=0, **changes):
    """A pipeline with a tiny random U-ViT; no weight is zero, so every block does something."""
    import torch

    import encoders
    import uvit_fusion
    cfg = tiny_cfg(clip_folder, **changes)
    device = torch.device("cpu")
    torch.manual_seed(seed)
    model = uvit_fusion.UViT(cfg).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    text_encoder = encoders.TextEncoder(clip_folder, device)
    return uvit_fusion.Pipeline(model, text_encoder, cfg, device, torch.float32)


def save_run(pipeline, folder):
    """Writes a pipeline as a run folder of uvit_fusion, for `uvit_fusion.load_pipeline`."""
    import common
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "config.json", dataclasses.asdict(pipeline.cfg))
    common.save_tensors(pipeline.model.state_dict(), folder / "model.safetensors")
    return folder


class Painter:
    """Stands in for a pipeline: of its prompts, one for each of the first scenes of the validation
    split, it draws those it knows, and nothing for the others."""
    def __init__(self, known, data, clip_folder):
        import torch

        import image_data
        dataset = image_data.CaptionedImages(data, "val", 24)
        self.images = np.stack([dataset.image(i).permute(1, 2, 0).numpy() for i in range(20)])
        self.known = known
        self.cfg = SimpleNamespace(clip=clip_folder)
        self.device = torch.device("cpu")
        self.image_size = 24

    def generate(self, prompts, **sampling):
        images = self.images[:len(prompts)].copy()
        images[[prompt not in self.known for prompt in prompts]] = 255
        return images


@pytest.fixture
def pipeline(clip_folder):
    """A random pipeline of 8 x 8 pixels, a new one for each test."""
    return tiny_pipeline(clip_folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory, clip_folder):
    """The run folder of a random pipeline of 24 x 24 pixels, a base for methods; read only."""
    pipeline = tiny_pipeline(clip_folder, size=24, patch=8)
    return save_run(pipeline, tmp_path_factory.mktemp("runs") / "base")


def run(script, *flags, cwd):
    """Runs main() of a script ("eval.py", "experiments.fusion") in this process.

    Returns (exit status, output, errors).
    """
    import common
    out, errors, status = io.StringIO(), io.StringIO(), 0
    before, argv = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            common.entry(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return status, out.getvalue(), errors.getvalue()


def refused(result, *words):
    """Asserts that a run ended with status 2 and a one-line error that contains these words."""
    status, _, errors = result
    assert status == 2, errors
    lines = [line for line in errors.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    for word in words:
        assert str(word) in lines[0], errors


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Scripts run on a pretended GPU, where tensors of two devices must not meet: tests/gpu.py."""
    import gpu
    with gpu.pretended(monkeypatch):
        yield
