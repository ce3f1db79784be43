"""What the methods share: images and captions are read, texts encoded, runs saved and resumed."""
import argparse
import dataclasses
import errno
import http.server
import importlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import TINY, make_coco, run
from huggingface_hub import constants as hub
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import common
import encoders
import image_data
import uvit_fusion
from common import UserError
from encoders import LLMEncoder
from image_data import CaptionedImages
from toy.models import train_tokenizer


# ------------------------------------------------------------------------------- captioned images
def images_with_texts(root, count=24):
    root.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 30), (10 * i % 256, 0, 0)).save(root / f"{i:03d}.png")
        (root / f"{i:03d}.txt").write_text(f"picture {i} told\n\nthe same in other words\n")
    return root


def images_with_metadata(root):
    images_with_texts(root)
    lines = []
    for path in sorted(root.glob("*.txt")):
        lines.append(json.dumps({"file_name": f"{path.stem}.png", "text": path.read_text()}))
        path.unlink()
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("layout, train, val, captions", [
    (make_coco, 12, 4, 5), (lambda root: make_coco(root, "2014"), 12, 4, 5),
    (images_with_texts, 23, 1, 2), (images_with_metadata, 23, 1, 1)])
def test_a_folder_in_any_of_these_layouts_is_images_with_captions(
        tmp_path, layout, train, val, captions):
    root = layout(tmp_path / "data")
    dataset = CaptionedImages(root, "train", 16)
    assert (len(dataset), len(CaptionedImages(root, "val", 16))) == (train, val)
    assert all(len(texts) == captions for _, texts, _ in dataset.items)
    path, texts, _ = dataset.items[1]
    assert int(path.stem[-3:]) == int(texts[0].split()[1])       # its own caption
    assert "\n" not in texts[0] and texts[0] == texts[0].strip()
    image, caption, broken = dataset[1, 7]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    assert caption in texts and broken == ""
    assert dataset[1, 7][1] == caption                           # the seed decides


def test_every_image_comes_once_an_epoch_with_changing_captions(coco):
    dataset = CaptionedImages(coco, "train", 16)
    batches = list(image_data.batches(dataset, 4, 0, 6, seed=0))
    assert all(images.shape == (4, 3, 16, 16) for images, _ in batches)
    captions = [caption for _, some in batches for caption in some]
    numbers = [caption.split()[1] for caption in captions]
    assert len(set(numbers[:12])) == len(set(numbers[12:])) == 12
    assert numbers[:12] != numbers[12:] and len(set(captions)) > 14


def test_a_batch_depends_on_seed_and_step_alone_and_ranks_share_it(coco):
    dataset = CaptionedImages(coco, "train", 16)
    whole = list(image_data.batches(dataset, 4, 0, 5, seed=1, workers=0))
    for begin, workers in ((3, 0), (0, 2)):                      # resumed; read by processes
        again = image_data.batches(dataset, 4, begin, 5, seed=1, workers=workers)
        for (images, captions), (same, alike) in zip(whole[begin:], again, strict=True):
            assert torch.equal(images, same) and captions == alike
    assert whole[0][1] != next(image_data.batches(dataset, 4, 0, 5, seed=2))[1]
    shares = [image_data.batches(dataset, 4, 0, 5, 1, rank=rank, world_size=2) for rank in (0, 1)]
    for (_, captions), (_, first), (_, second) in zip(whole, *shares):
        assert captions == first + second


def test_batches_of_processes_need_no_shared_memory(coco, monkeypatch):
    def use(*_):
        raise AssertionError("a batch goes by shared memory")
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", use)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", use)
    dataset = CaptionedImages(coco, "train", 16)
    images = [images for images, _, _ in image_data.load_all(dataset, 5, "images", workers=2)]
    expected = torch.stack([dataset.image(i) for i in range(12)])
    assert torch.equal(torch.cat(images), expected)


class Dying(CaptionedImages):
    """A data set whose images kill the process that reads them, or are all broken."""
    killed = True

    def image(self, i):
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise image_data.BrokenImage(f"{i} is broken")


def test_a_process_that_dies_or_finds_no_image_ends_the_run_with_one_line(coco, capsys):
    for killed, words in ((True, "a process that reads images died"), (False, "twenty images")):
        dataset = Dying(coco, "train", 16)
        dataset.killed = killed
        with pytest.raises(SystemExit) as end:
            common.entry(
                lambda data=dataset: list(image_data.load_all(data, 4, "images", workers=1)))
        lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert end.value.code == 2 and len(lines) == 1 and f"error: {words}" in lines[0]
    with pytest.raises(UserError, match="--workers -1: expected"):
        list(image_data.load_all(dataset, 4, "images", workers=-1))


def test_an_image_is_its_largest_centred_square(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (10, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert np.array_equal(image_data.load_image(tmp_path / "wide.png", 10), pixels[:, 3:13])
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "tall.png")
    assert np.array_equal(image_data.load_image(tmp_path / "tall.png", 10), np.rot90(pixels)[3:13])


def test_a_jpeg_may_be_large_grey_for_print_or_turned_by_a_camera(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((328, 200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6                                             # shown turned by 90 degrees
    photo.save(tmp_path / "RGB.jpg")
    photo.convert("L").save(tmp_path / "L.jpg")
    photo.convert("CMYK").save(tmp_path / "CMYK.jpg")
    photo.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("RGB", "L", "CMYK", "turned"):
        expected = photo.convert("L").convert("RGB") if name == "L" else photo
        expected = np.asarray(expected.crop((64, 0, 264, 200)).resize((16, 16)))
        found = image_data.load_image(tmp_path / f"{name}.jpg", 16).astype(float)
        assert np.abs(found - expected).mean() < 5               # decoded at an eighth of its size


@pytest.mark.parametrize("mode, ending", [
    ("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("LA", "png"), ("P", "png"), ("P", "gif"),
    ("RGB", "png")])
def test_what_hides_under_clear_pixels_is_not_seen(tmp_path, capsys, mode, ending):
    image_data.say_once.cache_clear()
    pixels = np.zeros((16, 16, 4), np.uint8)                     # black where transparent
    pixels[4:12, 4:12] = (153, 153, 153, 255)
    image, options = Image.fromarray(pixels), {}
    if ending == "webp":
        options = {"lossless": True, "exact": True}
    if mode in ("P", "RGB"):                                     # one colour is transparent
        image = image.convert("RGB").convert(mode)
        options = {"transparency": image.getpixel((0, 0))}
    image.convert(mode).save(tmp_path / f"a.{ending}", **options)
    for _ in range(2):
        found = image_data.load_image(tmp_path / f"a.{ending}", 16)
    expected = np.where(pixels[..., 3:], pixels[..., :3], 255)
    assert np.abs(found.astype(int) - expected).max() <= 2
    assert capsys.readouterr().out.count("white background") == 1    # said once


def test_grey_of_16_bits_is_scaled_and_what_has_no_scale_is_refused(tmp_path):
    grey = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    for ending in ("png", "tif"):
        Image.fromarray(grey).save(tmp_path / f"a.{ending}")
        found = image_data.load_image(tmp_path / f"a.{ending}", 16)
        assert np.array_equal(found, np.repeat(grey[..., None] // 257, 3, -1))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(grey.astype(np.int32) // 300).save(tmp_path / "int.tif")
    for name, words in (("float.tif", "HDR"), ("int.tif", "32-bit")):
        with pytest.raises(image_data.BrokenImage, match=f"{name} .*{words}"):
            image_data.load_image(tmp_path / name, 16)


def test_a_photo_is_turned_by_its_orientation_whatever_else_its_exif_holds(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8] = 255                                         # white at the top left
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1),
               8: (1, 0)}
    for orientation, (row, column) in corners.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[0x9286] = b"ASCII" * 3                              # UserComment
        data = exif.tobytes()
        # an entry whose type does not fit its value, which Pillow reads but cannot write
        broken = data.replace(b"\x92\x86\x00\x07", b"\x92\x86\x00\x0b")
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=broken, quality=95)
        found = image_data.load_image(tmp_path / "a.jpg", 16)[..., 0]
        quarters = found.reshape(2, 8, 2, 8).mean((1, 3))
        assert quarters[row, column] > 200 and quarters.sum() < 300, orientation


def test_whatever_a_decoder_raises_makes_a_broken_image(tmp_path, monkeypatch):
    def raising(error):
        def load(self):
            raise error
        return load
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for error in (TypeError("a"), AttributeError("b"), IndexError(), MemoryError(), EOFError()):
        monkeypatch.setattr(Image.Image, "load", raising(error))
        with pytest.raises(image_data.BrokenImage, match="a.png cannot be read"):
            image_data.load_image(tmp_path / "a.png", 8)


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")


def test_hidden_files_are_skipped_and_what_is_left_out_is_told(tmp_path, capsys):
    root = images_with_texts(tmp_path / "data", 40)
    for name in ("._000.png", ".thumbnails/000.png", "__MACOSX/._1.png", "@eaDir/1.png/2.png"):
        write_image(root / name)
        (root / name).with_suffix(".txt").write_text("hidden")
    (root / "folder.png").mkdir()
    for name in ("new.gif", "new.TIF", "upper.png", "bare.png", "c.png", "d.png", "blank.png"):
        write_image(root / name)
    for name in ("new.txt", "upper.TXT", "c.caption", "d.png.txt"):
        (root / name).write_text("one caption")
    (root / "blank.txt").write_text(" \n\n")
    (root / "photo.heic").write_bytes(b"")
    datasets = [CaptionedImages(root, split, 8) for split in ("train", "val", "val")]
    assert len(datasets[0]) + len(datasets[1]) == 43             # 40, new.gif, new.TIF, upper.png
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2                                       # one per split, printed once
    for line, dataset in zip(lines, datasets):
        assert line.startswith(f"{root}: {len(dataset)} images for ")
        for part in ("1 .heic (photo.heic)", "1 .caption (c.caption)", "4 without a caption (bare",
                     "1 .txt with no image (d.png.txt)"):
            assert part in line
        assert "Dir" not in line and "._" not in line


def test_a_new_file_moves_no_other_between_training_and_validation(tmp_path):
    root = images_with_texts(tmp_path / "data", 200)
    (root / "000.png").rename(root / "200.png")
    (root / "000.txt").rename(root / "200.txt")
    before = {split: {path for path, _, _ in CaptionedImages(root, split, 8).items}
              for split in ("train", "val")}
    assert 2 <= len(before["val"]) <= 25 and not before["val"] & before["train"]
    write_image(root / "000.png")                                # the first by name
    (root / "000.txt").write_text("new")
    for split in ("train", "val"):
        after = {path for path, _, _ in CaptionedImages(root, split, 8).items}
        assert after - {root / "000.png"} == before[split]


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfa caf\xc3\xa9\r\n", b"a caf\xc3\xa9"])
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, text):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(text)
    captions = {caption for split in ("train", "val")
                for _, captions, _ in CaptionedImages(tmp_path, split, 8).items
                for caption in captions}
    assert captions == {"a caf\u00e9"}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert common.read_json(tmp_path / "a.json") == {}


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_a_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path, name):
    write_image(tmp_path / "a.png")
    text = b'{"file_name": "a.png", "text": "fine"}\n'
    (tmp_path / name).write_bytes(text + text.replace(b"fine", b"caf\xe9"))
    with pytest.raises(UserError, match=f"{name}, line 2: not in UTF-8"):
        CaptionedImages(tmp_path, "train", 8)
    (tmp_path / name).write_text("caption\n", encoding="utf-16")
    with pytest.raises(UserError, match=f"{name}, line 1: not in UTF-8"):
        CaptionedImages(tmp_path, "train", 8)


def test_a_data_set_as_the_hub_writes_it(tmp_path):
    lines = {
        "train": ['{"file_name": "sub/a.png", "caption": "told"}', "",
                  '{"file_name": "b.png", "text": ["one", " ", "an\\nother"]}',
                  '{"file_name": "c.png", "text": null}', '{"file_name": "d.png", "text": ""}',
                  '{"file_name": "e.png", "text": "not there"}', ""],
        "validation": ['\ufeff{"file_name": "v.png", "text": "held out"}']}
    for split, own in lines.items():
        for name in ("sub/a", "b", "c", "d", "v"):
            write_image(tmp_path / split / f"{name}.png")
        path = tmp_path / split / "metadata.jsonl"
        path.write_text("\n".join(own), encoding="utf-8")
    items = CaptionedImages(tmp_path, "train", 8).items
    assert [captions for _, captions, _ in items] == [["told"], ["one", "an other"]]
    assert items[0][0] == tmp_path / "train" / "sub" / "a.png"
    assert [captions for _, captions, _ in CaptionedImages(tmp_path, "val", 8).items] == [
        ["held out"]]
    path.write_text('{"file_name": "v.png", "prompt": "held out"}')
    with pytest.raises(UserError, match='v.png: .*expected "text"'):
        CaptionedImages(tmp_path, "val", 8)


@pytest.mark.parametrize("name", ["metadata.csv", "a.caption", "a.jpg.txt"])
def test_other_layouts_are_refused_with_the_way_out(tmp_path, name):
    with pytest.raises(UserError, match="has no split vall, only train and val"):
        CaptionedImages(tmp_path, "vall", 8)
    write_image(tmp_path / "a.jpg")
    (tmp_path / name).write_text("file_name,text\na.jpg,a caption\n")
    with pytest.raises(UserError, match=f"{name}.*a.txt next to a.jpg .*metadata.jsonl"):
        CaptionedImages(tmp_path, "train", 8)


def test_coco_is_read_as_people_have_it(coco, capsys):
    path = coco / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
        if annotation["image_id"] == "11":
            annotation["caption"] = None
    names = ["train2017/000000000000.jpg", "gone.jpg", "e\u0301.jpg"]
    for image, name in zip(content["images"][:1] + content["images"][2:], names):
        image["file_name"] = name
    (coco / "train2017" / "000000000003.jpg").rename(coco / "train2017" / "\u00e9.jpg")
    path.write_text(json.dumps(content))
    # captions of 2014 and, though newer, of 2018 are skipped: their images are not there
    for year in ("2014", "2018"):
        (coco / "annotations" / f"captions_train{year}.json").write_text("{}")
    dataset = CaptionedImages(coco, "train", 16)
    numbers = [int(captions[0].split()[1]) for _, captions, _ in dataset.items]
    assert numbers == [0, *range(3, 12)]
    dataset.image(1)
    out = capsys.readouterr().out
    assert "10 images for train; left out: 1 without a caption (000000000001.jpg), " in out
    assert "1 not in their folder (gone.jpg)" in out


def test_linked_folders_are_followed_once(tmp_path):
    images_with_texts(tmp_path / "elsewhere", 8)
    root = tmp_path / "data"
    root.mkdir()
    (root / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(root)
    assert len(CaptionedImages(root, "train", 8)) == 7


def test_pixels_become_floats_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(-1, 3, -1, -1)
    x = image_data.to_float(images)
    assert x.min() == -1 and x.max() == 1
    assert np.array_equal(image_data.to_uint8(x), images.permute(0, 2, 3, 1).numpy())
    beyond = torch.tensor([-2.0, 2.0, 0.0]).view(1, 3, 1, 1)
    assert image_data.to_uint8(beyond).tolist() == [[[[0, 255, 128]]]]
    with pytest.raises(UserError, match="gives nan"):            # they would be drawn black
        image_data.to_uint8(torch.tensor([math.nan]).view(1, 1, 1, 1))


def test_a_broken_image_is_replaced_and_counted(tmp_path, capsys):
    root = images_with_texts(tmp_path / "data", 220)
    (root / "007.png").write_bytes((root / "007.png").read_bytes()[:40])
    dataset = CaptionedImages(root, "train", 16)
    images = torch.cat([images for images, _ in image_data.batches(dataset, 11, 0, 40, seed=0)])
    assert images.shape == (440, 3, 16, 16)
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "\n1 images could not be read" in out
    for i in (8, 9):
        (root / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(UserError, match="3 of 2.. images cannot be read, more than 1 %"):
        list(image_data.batches(CaptionedImages(root, "train", 16), 11, 0, 40, seed=0))
    for path in root.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="twenty images in a row"):
        CaptionedImages(root, "train", 16)[0, 0]


@pytest.mark.parametrize("damage, words", [
    (lambda coco: shutil.rmtree(coco), "--data .*coco: there is no such folder"),
    (lambda coco: (coco / "annotations" / "captions_train2017.json").unlink(), "train2014.json"),
    (lambda coco: (coco / "annotations" / "captions_train2017.json").write_text("{"), "one JSON"),
    (lambda coco: (coco / "annotations" / "captions_train2017.json").write_text("[]"), "one JSON"),
    (lambda coco: (coco / "annotations" / "captions_train2017.json").write_text(
        '{"images": [], "annotations": [{"bbox": []}]}'), "not instances"),
    (lambda coco: shutil.rmtree(coco / "train2017"), "unpack train2017.zip"),
    (lambda coco: shutil.rmtree(coco / "annotations"), "16 without a caption .*a.txt")])
def test_a_folder_that_is_not_as_described_is_refused(coco, damage, words):
    damage(coco)
    with pytest.raises(UserError, match=words):
        CaptionedImages(coco, "train", 16)


# ---------------------------------------------------------------------------------- text encoders
def test_a_text_encoder_gives_features_and_a_mask_that_no_other_caption_changes(
        clip_folder, capsys):
    encoder = encoders.TextEncoder(clip_folder)
    features, mask = encoder(["two red circles", "word " * 100, ""])
    assert features.shape == (3, 16, 32) == (3, encoder.length, encoder.dim)
    assert mask[1].all() and mask[2].tolist() == [True] * 2 + [False] * 14
    alone, own_mask = encoder(["two red circles"])
    assert torch.allclose(features[:1], alone, atol=1e-5) and torch.equal(mask[:1], own_mask)
    encoder(["word " * 90])
    assert capsys.readouterr().out.count("cut off") == 1         # said once
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_a_tokenizer_that_reads_no_tokens_is_refused(clip_folder, tmp_path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = common.read_json(folder / "tokenizer_config.json")
    common.write_json(folder / "tokenizer_config.json", config | {"model_max_length": 0})
    with pytest.raises(UserError, match="it reads no tokens: its tokenizer files do not match"):
        encoders.TextEncoder(folder)
    config = config | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None}
    common.write_json(folder / "tokenizer_config.json", config)
    with pytest.raises(UserError, match="--clip .*: it reads one text at a time"):   # as GPT-2
        encoders.TextEncoder(folder)


def test_features_of_captions_are_kept_if_they_fit_into_memory(clip_folder, monkeypatch):
    plain = encoders.TextEncoder(clip_folder)
    encoder = encoders.TextEncoder(clip_folder)
    memory = 3 * 4 * encoder.length * encoder.dim
    encoder.keep(["a", "man", "a", "red"], memory)               # with "", one caption too many
    assert encoder.kept is None
    encoder.keep(["a", "man", "a"], memory)
    encoded = []
    monkeypatch.setattr(encoder, "encode",
                        lambda captions: encoded.append(captions) or plain.encode(captions))
    for captions in (["a", "man", "a"], ["man"], ["", "a"], ["red", "a"]):
        for found, expected in zip(encoder(captions), plain(captions)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert encoded == [["red", "a"]], "only what is not kept is encoded"


TEXTS = ["two red circles above a blue square", "", "a man on a horse", "三个 circles и 🟢"]
SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=64)
T5 = dict(vocab_size=300, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2)
LLMS = {  # class of transformers: its settings, and what its tokenizer makes of a text
    "LlamaForCausalLM": (SIZES | dict(num_key_value_heads=1), "<|start|> $A"),
    "Qwen2ForCausalLM": (SIZES | dict(num_key_value_heads=1), "$A"),      # "" has no token
    "Gemma3ForCausalLM": (SIZES | dict(num_key_value_heads=1, head_dim=16, sliding_window=8),
                          "<|start|> $A"),
    "T5ForConditionalGeneration": (T5, "$A <|end|>"),
    "BertForMaskedLM": (SIZES, "<|start|> $A <|end|>"),
}


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    """The folders of language models with random weights, by class."""
    import transformers
    folders = {}
    for kind, (sizes, template) in LLMS.items():
        folders[kind] = str(tmp_path_factory.mktemp(kind))
        torch.manual_seed(0)
        model = getattr(transformers, kind)
        model = model(model.config_class(**sizes))
        for parameter in model.parameters():         # so that attention is far from even
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folders[kind])
        train_tokenizer(TEXTS, 300, 64, template).save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("kind", LLMS)
def test_an_llm_gives_the_states_of_each_text_as_if_it_were_alone(llms, kind):
    encoder = LLMEncoder(llms[kind])
    features, mask = encoder([*TEXTS, "horse " * 100])
    assert features.shape == (5, 64, 32) and features.dtype == torch.float32
    for i, text in enumerate(TEXTS):
        ids = encoder.tokenizer([text], return_tensors="pt").input_ids
        with torch.no_grad():
            expected = encoder.model(ids if len(ids[0]) else torch.zeros(1, 1).long())[0][0]
        assert mask[i].sum() == len(expected) and mask[i, :len(expected)].all()
        assert torch.allclose(features[i, :len(expected)], expected, atol=1e-4)
    assert mask[4].all()                             # cut off at the model's limit


@pytest.mark.parametrize("kind", LLMS)
def test_an_instruction_is_read_and_cut_off_again(llms, kind):
    text = "two red circles"
    plain, _ = LLMEncoder(llms[kind])([text])
    told, mask = LLMEncoder(llms[kind], instruction="a man on a horse ")([text, "a"])
    begin = LLMS[kind][1].startswith("<|start|>")    # a token before the instruction
    assert told.shape[1] == plain.shape[1] - begin and mask[0].all()
    assert (told[0] - plain[0, begin:]).abs().amax(-1).min() > 0.01   # every token has read it
    with pytest.raises(UserError, match="--instruction has .* tokens, but .* reads only 64"):
        LLMEncoder(llms[kind], instruction="horse " * 100)
    features, mask = LLMEncoder(llms[kind], instruction="describe:")([""])
    assert features.shape == (1, 1, 32) and mask.all()   # even no text leaves a token


def test_layers_count_from_the_embeddings_to_the_last(llms):
    at = {layer: LLMEncoder(llms["LlamaForCausalLM"], layer) for layer in (-3, -1, 0, 1, 2)}
    features = {layer: encoder(TEXTS[:1])[0] for layer, encoder in at.items()}
    ids = at[0].tokenizer(TEXTS[:1], return_tensors="pt").input_ids
    assert torch.equal(features[0], at[0].model.get_input_embeddings()(ids))
    assert torch.equal(features[0], features[-3]) and torch.equal(features[2], features[-1])
    assert not torch.allclose(features[1], features[2], atol=0.1)
    with pytest.raises(UserError, match="--llm-layer 3: .* 0 .* to 2"):
        LLMEncoder(llms["LlamaForCausalLM"], 3)
    # the identity names weights, layer and instruction, whatever the precision
    same = LLMEncoder(llms["LlamaForCausalLM"], dtype=torch.bfloat16)
    other = LLMEncoder(llms["LlamaForCausalLM"], instruction="a")
    assert at[2].identity == at[-1].identity == same.identity
    assert len({at[1].identity, at[2].identity, other.identity}) == 3


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_any_encoder_of_text_gives_the_features_of_a_caption_without_its_padding(llms, kind):
    encoder = encoders.TextEncoder(llms[kind])
    features, mask = encoder(TEXTS)
    assert features.shape == (4, 64, 32) == (4, encoder.length, encoder.dim)
    alone, _ = LLMEncoder(llms[kind])(TEXTS[:1])             # as long as the text itself
    assert mask.sum(1)[0] == alone.shape[1]
    assert torch.allclose(features[0, mask[0]], alone[0], atol=1e-4)


def test_an_encoder_reads_77_tokens_at_the_most(llms, tmp_path):
    shutil.copytree(llms["T5ForConditionalGeneration"], tmp_path / "t5")
    change_json(tmp_path / "t5" / "tokenizer_config.json", model_max_length=512)
    change_json(tmp_path / "t5" / "config.json", max_position_embeddings=512)
    assert encoders.TextEncoder(tmp_path / "t5")(["a man"])[0].shape == (1, 77, 32)


def test_word_embeddings_are_learned_with_the_network(tmp_path, capsys, caplog):
    """--clip words downloads nothing: the features are one-hot, the U-ViT has the embeddings."""
    colours = {"ruby": (255, 0, 0), "sapphire stone": (0, 0, 255)}
    (tmp_path / "data").mkdir()
    for i in range(80):
        caption = list(colours)[i % 2]
        Image.new("RGB", (8, 8), colours[caption]).save(tmp_path / "data" / f"{i:02d}.png")
        (tmp_path / "data" / f"{i:02d}.txt").write_text(caption)
    flags = ("uvit_fusion.py", "--train", "--data", "data", "--clip", "words", "--steps", 60,
             "--device", "cpu", "--out", "run", *TINY)
    status, output, errors = run(*flags, cwd=tmp_path)
    assert status == 0, errors
    # none of these captions is too long
    assert "cut off" not in output and "longer than" not in caplog.text

    encoder = encoders.TextEncoder(tmp_path / "run" / "words")
    encoder(["ruby sapphire stone"])
    assert capsys.readouterr().out.count("cut off") == 1
    features, mask = encoder([*colours, ""])
    ids = encoder.tokenizer("sapphire stone").input_ids
    assert features.shape == (3, len(ids), encoder.dim) and mask[1].all() and not mask[2].all()
    assert features[1].argmax(1).tolist() == ids
    assert torch.allclose(features.square().mean(2), torch.ones(3, len(ids)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        pipeline = uvit_fusion.load_pipeline("run", torch.device("cpu"), torch.float32)
    red, _, blue = pipeline.generate(list(colours), steps=10).mean((1, 2)).T       # of each image
    assert red[0] > 150 > 100 > red[1] and blue[1] > 150 > 100 > blue[0]
    status, _, errors = run(*flags, "--resume", cwd=tmp_path)
    assert status == 0, errors


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tokenizer_that_is_made_up_or_of_another_model_is_refused(llms, clip_folder, tmp_path):
    sources = [(encoders.TextEncoder, clip_folder), (encoders.ClipScorer, clip_folder),
               (encoders.TextEncoder, llms["BertForMaskedLM"]),
               (LLMEncoder, llms["Qwen2ForCausalLM"])]
    for i, (loader, source) in enumerate(sources):
        folder = tmp_path / str(i)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tokenizer*"))
        with pytest.raises(UserError, match="own tokenizer files .* in tokenizer/"):
            loader(folder)
    pairs = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]              # 64 more tokens
    train_tokenizer(pairs, 600, 64).save_pretrained(folder)
    with pytest.raises(UserError, match="the model has 300 tokens, its tokenizer [34]"):
        LLMEncoder(folder)


MISSING_PACKAGES = [(False, False, "pip install sentencepiece protobuf"),
                    (True, False, "pip install protobuf"), (True, True, "is damaged")]


@pytest.mark.parametrize("sentencepiece, protobuf, words", MISSING_PACKAGES)
def test_a_folder_with_tokenizer_model_alone_names_the_packages_that_are_missing(
        llms, tmp_path, monkeypatch, sentencepiece, protobuf, words):
    shutil.copytree(llms["LlamaForCausalLM"], tmp_path / "vicuna",
                    ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "vicuna" / "tokenizer.model").write_bytes(b"as sentencepiece writes it")
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: sentencepiece)
    monkeypatch.setattr("transformers.utils.is_protobuf_available", lambda: protobuf)
    with pytest.raises(UserError, match=f"--llm .*vicuna .* tokenizer.model .*{words}"):
        LLMEncoder(tmp_path / "vicuna")


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaModel
Path("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaModel):
    config_class = OwnConfig
"""


def test_code_that_a_model_brings_along_runs_with_its_flag_alone(llms, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(common, "TRUST_REMOTE_CODE", False)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llms["LlamaForCausalLM"], "own")
    change_json(Path("own/config.json"), model_type="own",
                auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    Path("own/own.py").write_text(OWN_CODE)
    with pytest.raises(UserError, match="--llm own .* add --trust-remote-code"):
        LLMEncoder("own")
    assert not Path("ran").exists()
    parser = argparse.ArgumentParser()
    common.add_device_flags(parser)
    parser.parse_args([])
    assert common.TRUST_REMOTE_CODE is False
    parser.parse_args(["--trust-remote-code"])
    encoder = LLMEncoder("own")
    assert Path("ran").exists() and type(encoder.model).__name__ == "OwnModel"
    expected, _ = LLMEncoder(llms["LlamaForCausalLM"])(TEXTS)
    assert torch.allclose(encoder(TEXTS)[0], expected, atol=1e-5)


@pytest.mark.parametrize("path, words", [
    ("./nowhere", "there is no such folder"), ("llama-Q4.gguf", "GGUF must be converted"),
    ("TheBloke/Llama-2-7B-GGUF", "GGUF must be converted"),
    ("gguf", "GGUF must be converted")])
def test_what_is_no_model_in_the_hugging_face_format_is_refused(
        tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    Path("gguf").mkdir()
    Path("gguf/llama-Q4.gguf").touch()
    with pytest.raises(UserError, match=f"--clip {path} cannot be loaded.*: {words}"):
        encoders.TextEncoder(path)


class Refusal(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)


def test_without_a_network_the_hub_is_asked_once_and_the_cache_is_read(monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:       # accepts, never answers
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not encoders.hub_answers(seconds=0.2)
    with pytest.raises(UserError, match="--llm some/model .*connect"):    # now closed
        LLMEncoder("some/model")
    assert hub.HF_HUB_OFFLINE
    with http.server.HTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.handle_request).start()
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert encoders.hub_answers(seconds=60)


# ------------------------------------------------------------------------------------------- LoRA
def test_lora_begins_as_nothing_and_merges_into_the_weights():
    model = torch.nn.ModuleDict({"qkv": torch.nn.Linear(12, 20), "fc": torch.nn.Linear(12, 20)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    common.add_lora(model, rank=3)
    assert torch.equal(model["qkv"].weight, before["qkv.weight"])
    trained = {name.split(".")[-1]: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"A", "B"}                # of qkv alone
    with torch.no_grad():
        trained["B"].normal_()
        expected = before["qkv.weight"] + trained["B"] @ trained["A"]
    assert torch.linalg.matrix_rank(trained["B"] @ trained["A"]) == 3
    assert torch.allclose(model["qkv"].weight, expected)
    with pytest.raises(UserError, match="rank 13 is above .* at most 12"):
        common.add_lora(torch.nn.ModuleDict({"qkv": torch.nn.Linear(12, 20)}), rank=13)
    merged = common.merge_lora(model).state_dict()
    torch.testing.assert_close(merged, before | {"qkv.weight": expected})


# ------------------------------------------------------------------------------------------- Muon
def test_muon_in_batches_is_muon():
    """Also for a matrix without a gradient, and after its state has been saved and loaded."""
    torch.manual_seed(0)
    shapes = [(12, 4), (4, 12), (12, 4), (4, 4), (12, 4)]
    models = [torch.nn.ParameterList(torch.ones(shape) for shape in shapes) for _ in range(2)]
    optimizers = [kind(model, lr=0.1, weight_decay=0.2)
                  for kind, model in zip((torch.optim.Muon, common.Muon), models)]
    for step in range(6):
        if step == 3:
            own = common.Muon(models[1], lr=0.1, weight_decay=0.2)
            own.load_state_dict(optimizers[1].state_dict())
            optimizers[1] = own
        gradients = [torch.randn(shape) for shape in shapes[:-1]]
        for model, optimizer in zip(models, optimizers):
            for parameter, gradient in zip(model, gradients):
                parameter.grad = gradient.clone()
            optimizer.step()
    for expected, found in zip(*models):                  # bf16 inside, in products of two shapes
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert (models[1][0] - 1).abs().max() > 0.3 and torch.equal(models[1][4], torch.ones(12, 4))


def test_matrices_of_all_shapes_are_orthogonalised_in_one_product():
    """As on a GPU: zeros around a matrix change nothing in it."""
    torch.manual_seed(0)
    stacks = [torch.randn(3, 4, 12), torch.randn(2, 4, 4), torch.randn(1, 6, 8)]
    settings = (3.4445, -4.775, 2.0315), 5, 1e-7
    merged = common.orthogonalise(common.pad_and_stack(stacks), *settings)
    assert merged.shape == (6, 6, 12)
    for found, stack in zip(common.unstack(merged, stacks), stacks, strict=True):
        expected = common.orthogonalise(stack, *settings)
        torch.testing.assert_close(found, expected)


def test_muon_orthogonalises_in_the_precision_that_it_is_given():
    """A CPU without AVX-512 took 1766 ms per step of the toy network in bf16, 44 in fp32."""
    gradient = torch.randn(8, 12)
    moved = {}
    for precision in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.zeros(8, 12))
        weight.grad = gradient.clone()
        common.Muon([weight], precision, lr=1.0, weight_decay=0.0).step()
        moved[precision] = weight.detach()
    direction = common.orthogonalise(gradient[None], (3.4445, -4.775, 2.0315), 5, 1e-7)[0]
    torch.testing.assert_close(moved[torch.float32], -direction)
    assert torch.equal(moved[torch.bfloat16], moved[torch.bfloat16].bfloat16().float())
    assert not torch.equal(*moved.values())


# ------------------------------------------------------------------------------------------ files
def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), common.atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with common.atomic_write(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


class Code:
    """In a pickle, it would create the folder `ran` when read."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_stays(
        tmp_path, capsys, error):
    (tmp_path / "a").write_text("old")

    def write():
        with common.atomic_write(tmp_path / "a"):
            raise error
    with pytest.raises(SystemExit):
        common.entry(write)
    assert f"{tmp_path}/a cannot be written: {error}\n" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_weights_are_read_and_code_beside_them_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    common.save_tensors(tensors, "a.safetensors")
    torch.save({"state_dict": tensors | {"step": 3}}, "a.pth")
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": {"weight": torch.zeros(1)}, "ema": prefixed, "step": 3}, "ema.pt")
    for name in ("a.safetensors", "a.pth", "ema.pt"):
        torch.testing.assert_close(common.read_weights(name, "weights"), tensors)
    torch.save({"weight": Code()}, "code.pth")
    with pytest.raises(UserError, match="code.pth contains code"):
        common.read_weights("code.pth", "code.pth")
    assert not os.path.exists("ran")
    for name in ("a.safetensors", "a.pth"):
        Path(name).write_bytes(Path(name).read_bytes()[:150])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            common.read_weights(name, name)
    with pytest.raises(UserError, match="no file none.pth: train first"):
        common.read_weights("none.pth", "base", ": train first")
    with pytest.raises(UserError, match=r"a.pth .*weight: \(2, 3\) in the file, \(2, 4\) here"):
        common.load_into(torch.nn.Linear(4, 2), tensors, "a.pth")


# --------------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Config:
    steps: int = 50  # training steps
    rate: float = 0.5  # share of 100 %
    kind: Literal["a", "b"] = "a"  # which of the two
    masked: bool = True  # or not
    betas: tuple = (0.9, 0.99)  # of the optimizer
    width: int = 8


PRESETS = {"toy": {}, "large": {"width": 64, "steps": 1000}}


def test_the_comment_behind_a_setting_is_the_help_of_its_flag(capsys, tmp_path):
    parser = argparse.ArgumentParser()
    common.add_config_flags(parser, Config, PRESETS)
    help_text = parser.format_help()
    assert "training steps (toy: 50)" in help_text and "share of 100 %" in help_text
    assert "--width" not in help_text                # no comment, no flag
    flags = "--preset large --steps 7 --rate 1e-3 --kind b --no-masked --betas 0 1".split()
    cfg = common.make_config(Config, PRESETS, parser.parse_args(flags))
    assert cfg == Config(7, 1e-3, "b", False, (0.0, 1.0), 64)
    assert common.make_config(Config, PRESETS, parser.parse_args([])) == Config()
    own_data = argparse.Namespace(preset=None, data="photographs")
    assert common.make_config(Config, PRESETS, own_data) == Config()
    presets = PRESETS | {"pictures": {"width": 16}}  # the default for one's own data
    assert common.make_config(Config, presets, own_data) == Config(width=16)
    presets["quick"] = {"width": 8}                      # with --quick, for the toy world
    quick = argparse.Namespace(preset=None, quick=True)
    assert common.make_config(Config, presets, quick) == Config(width=8)
    assert common.make_config(Config, PRESETS, quick) == Config()
    quick.data = "photographs"
    assert common.make_config(Config, presets, quick) == Config(width=16)
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "c"])
    assert "invalid choice: 'c'" in capsys.readouterr().err
    common.write_json(tmp_path / "config.json", dataclasses.asdict(cfg))
    assert common.read_config(Config, tmp_path) == cfg
    common.write_json(tmp_path / "config.json", {"depth": 3})
    with pytest.raises(UserError, match="config.json: depth: .*no such setting"):
        common.read_config(Config, tmp_path)
    for name, value in (("steps", 7.5), ("steps", "many"), ("steps", 2**40), ("rate", math.nan),
                        ("rate", -1), ("kind", "c"), ("masked", 1), ("betas", 3), ("betas", ["a"])):
        common.write_json(tmp_path / "config.json", {name: value})
        with pytest.raises(UserError, match=f"config.json: {name}: "):
            common.read_config(Config, tmp_path)
    for flag in ("--steps=1e3", f"--steps={10**40}", "--rate=nan", "--rate=inf", "--betas=0,1"):
        with pytest.raises(SystemExit):
            parser.parse_args([flag])
    with pytest.raises(UserError, match="--steps: -1 is below 0"):
        common.make_config(Config, PRESETS, parser.parse_args(["--steps", "-1"]))


@pytest.mark.parametrize("method", ["llm_adapter", "sur_adapter", "fine_rewards", "dsd"])
def test_quick_changes_the_defaults_and_no_flag_that_is_given(tmp_path, monkeypatch, method):
    settings = []
    folders = []
    make_config = common.make_config
    monkeypatch.setattr(common, "make_config", lambda *args: (
        settings.append(dataclasses.asdict(make_config(*args))), make_config(*args))[1])

    def check_run(folder, args):
        folders.append((str(folder), args.samples))
        raise UserError("enough")
    monkeypatch.setattr(common, "check_run", check_run)
    for flags in ([], ["--quick"], ["--quick", "--warmup", 7, "--samples", 9, "--out", "mine"]):
        run(f"{method}.py", "--train", *flags, cwd=tmp_path)
    module = importlib.import_module(method)
    quick = dict(module.QUICK)
    assert folders == [(f"runs/{method}", 512 if method == "dsd" else 2048),
                       (quick.pop("out"), quick.pop("samples")), ("mine", 9)]
    usual = dataclasses.asdict(module.Config())
    assert settings == [usual, usual | quick, usual | quick | {"warmup": 7}]
    assert all(value < usual[name] for name, value in quick.items())


# ----------------------------------------------------------------------------------- a run folder
def train(folder, cfg=None, resume=False, overwrite=False, precision="fp32", events=(), data=None):
    """A training as in every method, of one weight, to which each step adds its number.

    events: {step: function(model) to call at that step}; data: the folder of its data.
    """
    cfg = cfg or Config()
    model = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    model.weight.zero_()
    args = argparse.Namespace(resume=resume, overwrite=overwrite)
    run = common.Run(folder, cfg, [model], model.state_dict(), args, precision, save_every=30,
                     dataset=data and CaptionedImages(data, "train", 8))
    for step in range(run.start + 1, cfg.steps + 1):
        model.weight += step
        if step in events:
            events[step](model)
        rare = None if step % 25 else step
        run.log(step, loss=model.weight.mean(), rare=rare)
        if run.due(step):
            run.save(step)
    return model.weight.item()


def test_a_run_leaves_its_settings_its_weights_its_losses_and_a_plot(tmp_path):
    assert train(tmp_path / "run") == 1275           # 1 + ... + 50
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "model.safetensors", "state.pt", "metrics.csv", "loss.png"}
    assert load_file(tmp_path / "run" / "model.safetensors")["weight"].item() == 1275
    assert common.read_config(Config, tmp_path / "run") == Config()
    rows = (tmp_path / "run" / "metrics.csv").read_text().split()
    # means over steps: the weight is n (n + 1) / 2 after step n
    assert rows == ["step,loss,rare", "20,77,", "40,497,25", "50,1062,50"]


def ctrl_c(model):
    signal.raise_signal(signal.SIGINT)


def power_cut(model):
    raise RuntimeError


def diverge(model):
    model.weight.fill_(math.nan)


@pytest.mark.parametrize("step", [10, 35])
def test_ctrl_c_saves_and_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, capsys, step):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", events={step: ctrl_c})
    assert stopped.value.code == 130
    assert f"stopped after step {step}; to continue: the same" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == step
    assert train(tmp_path / "run", resume=True) == 1275


def test_a_killed_run_goes_on_from_its_checkpoint_and_logs_no_step_twice(tmp_path):
    with pytest.raises(RuntimeError):
        train(tmp_path / "run", events={45: power_cut})
    (tmp_path / "run" / "samples").mkdir()
    (tmp_path / "run" / "samples" / "step_40.png.unfinished").touch()
    assert load_file(tmp_path / "run" / "model.safetensors")["weight"].item() == 465   # step 30
    assert train(tmp_path / "run", resume=True) == 1275
    rows = (tmp_path / "run" / "metrics.csv").read_text().split()[1:]
    assert [row.split(",")[0] for row in rows] == ["20", "40", "50"]
    assert not list((tmp_path / "run").rglob("*.unfinished"))


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="step 40: .*nan.* --lr"):
        train(tmp_path / "run", events={33: diverge})
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == 30


@pytest.mark.parametrize("writer, error, whole", [
    ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), 30),
    ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos"), 30),
    ("plot", OSError(errno.ENOSPC, "No space left on device"), 60)])
def test_a_full_disk_is_told_with_the_checkpoint_that_is_whole(
        tmp_path, monkeypatch, writer, error, whole):
    def fail(*_, **__):
        raise error

    def fill(model):
        monkeypatch.setattr(f"common.{writer}", fail)
    with pytest.raises(UserError, match=f"cannot be written: .*of step {whole} is intact"):
        train(tmp_path / "run", Config(steps=60), events={45: fill})
    monkeypatch.undo()
    assert train(tmp_path / "run", Config(steps=60), resume=True) == 1830


@dataclasses.dataclass
class Constant:
    """Settings of a training whose rate is constant if decay is 0."""
    steps: int = 50
    decay: float = 0.0
    noise_first: float = 0.0
    data: str = ""
    init: str = ""


def test_a_run_goes_on_with_more_steps_where_its_rate_is_constant(tmp_path):
    train(tmp_path / "run", Constant(steps=40))
    with pytest.raises(UserError, match="started with steps = 40, now it is 30"):
        train(tmp_path / "run", Constant(steps=30), resume=True)
    assert train(tmp_path / "run", Constant(steps=50), resume=True) == 1275
    assert common.read_config(Constant, tmp_path / "run").steps == 50
    with pytest.raises(UserError, match="ends with the last step; .*--init .*model.safetensors"):
        train(tmp_path / "run", Constant(steps=60, decay=1.0), resume=True)


def test_a_run_whose_noise_depends_on_its_length_keeps_it(tmp_path):
    train(tmp_path / "run", Constant(steps=40, noise_first=0.5))
    with pytest.raises(UserError, match="started with steps = 40, now it is 50"):
        train(tmp_path / "run", Constant(steps=50, noise_first=0.5), resume=True)


def test_a_run_goes_on_with_the_same_data_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(images_with_texts(tmp_path / "data").parent)
    shutil.copytree("data", "moved")
    shutil.copytree("data", "changed")
    Path("changed/001.txt").write_text("another caption")
    train("run", Constant(data="data"), data="data")
    for path in ("./data", str(tmp_path / "data"), "moved"):
        assert train("run", Constant(data=path), resume=True, data=path) == 1275
    with pytest.raises(UserError, match="started with data = moved, now it is changed"):
        train("run", Constant(data="changed"), resume=True, data="changed")


def test_what_a_run_needs_is_found_around_it(tmp_path, monkeypatch):
    (tmp_path / "models" / "clip").mkdir(parents=True)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    common.write_json(folder / "config.json", {"data": "models/clip"})
    assert common.read_config(Constant, folder).data == str(tmp_path / "models" / "clip")
    monkeypatch.chdir(tmp_path)                      # found as spelled
    assert common.read_config(Constant, folder).data == "models/clip"
    common.write_json(folder / "config.json", {"data": "openai/clip"})
    assert common.read_config(Constant, folder).data == "openai/clip"


def train_with_adam(folder, resume=False):
    """Two steps of AdamW on one layer."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(resume=resume, overwrite=False)
    run = common.Run(folder, Config(steps=2), [model, optimizer], model.state_dict(), args, "fp32")
    for step in range(run.start + 1, 3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        run.log(step, loss=1.0)
    run.save(2)


@pytest.mark.parametrize("damage", [
    lambda state: state.pop("parts"), lambda state: state.update(step=-1),
    lambda state: state.update(step="all"), lambda state: state.update(parts=[{}]),
    lambda state: state["parts"][0].update(weight=torch.zeros(2)),
    lambda state: state["parts"][1].pop("state"),
    lambda state: state["parts"][1]["state"][0].pop("exp_avg"),
    lambda state: state["parts"][1]["state"][0].update(exp_avg=torch.zeros(7)),
    lambda state: state["parts"][1].update(state={9: {"step": torch.zeros(2)}}), bytes])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    path = tmp_path / "run" / "state.pt"
    train_with_adam(tmp_path / "run")
    state = torch.load(path)
    if damage is bytes:                              # one of them has changed
        content = bytearray(path.read_bytes())
        content[content.index(state["parts"][0]["weight"].numpy().tobytes())] ^= 1
        path.write_bytes(content)
    else:
        damage(state)
        torch.save(state, path)
    with pytest.raises(UserError, match="state.pt: .*it is damaged: start over with --overwrite"):
        train_with_adam(tmp_path / "run", resume=True)


def test_rows_of_metrics_that_were_cut_off_are_left_out(tmp_path):
    path = tmp_path / "run" / "metrics.csv"
    with pytest.raises(RuntimeError):
        train(tmp_path / "run", events={45: power_cut})
    path.write_text(path.read_text() + "20,1\n,,\n2\n\udcff\n", errors="surrogateescape")
    assert train(tmp_path / "run", resume=True) == 1275
    rows = path.read_text().split()
    assert rows == ["step,loss,rare", "20,77,", "40,652,", "50,1062,50"]


def test_a_run_is_not_mixed_with_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--resume: there is no run in run/"):
        common.check_run("run", argparse.Namespace(resume=True, overwrite=False))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out file is a file"):
        common.check_run("file", argparse.Namespace(resume=False, overwrite=True))
    train("run")
    with pytest.raises(UserError, match="run/ already holds a run: --resume .* --overwrite"):
        train("run")
    with pytest.raises(UserError, match="started with steps = 50, now it is 60"):
        train("run", Config(steps=60), resume=True)
    with pytest.raises(UserError, match="trained in fp32, now .* bf16"):
        train("run", resume=True, precision="bf16")
    torch.save({"precision": "fp32", "step": Code()}, "run/state.pt")
    with pytest.raises(UserError, match="state.pt: .*damaged"):
        train("run", resume=True)
    assert not os.path.exists("ran")
    assert train("run", overwrite=True) == 1275
    assert common.run_files("run/step1400.safetensors")[0] == common.run_files("run")[0]


# ----------------------------------------------------------------------------- results, pictures
def test_intervals_shrink_with_the_number_of_values():
    few = np.array([0, 1, np.nan] * 50, float)       # nan: a question that does not apply
    assert common.ci95(few) == pytest.approx(1.96 * 0.5 / 10)
    assert common.ci95(np.tile(few, 4)) == pytest.approx(common.ci95(few) / 2)
    assert common.percent("count", few) == pytest.approx({"count": 50, "count_ci": 9.8})


def test_results_are_kept_beside_new_ones_and_say_how_they_were_made(tmp_path):
    common.write_results(tmp_path / "run", {"all": 12.3456789, "samples": 2048})
    common.write_results(tmp_path / "run", {"all": 13.0})
    results = common.read_json(tmp_path / "run" / "results.json")
    assert (results["all"], results["samples"]) == (13.0, 2048)
    assert set(results) == {"all", "samples", "commit", "machine", "command"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_peak_memory_is_in_millions_of_bytes():
    status = Path("/proc/self/status").read_text().split()
    kib = int(status[status.index("VmHWM:") + 1])
    assert common.peak_memory_mb() == pytest.approx(kib * 1024 / 1e6, rel=0.01)


def test_a_gpu_that_was_not_used_is_not_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert common.machine() != "a GPU"               # --device cpu
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert common.machine() == "a GPU"


def test_a_grid_has_each_image_in_its_place_and_its_text_below(tmp_path):
    images = np.empty((4, 128, 128, 3), np.uint8)
    images[:] = np.array([0, 60, 120, 180]).reshape(4, 1, 1, 1)
    common.image_grid(images, [""] * 4, tmp_path / "bare.png", columns=2)
    bare = np.asarray(Image.open(tmp_path / "bare.png"))
    assert bare.shape == (280, 280, 3)
    assert [bare[y, x, 0] for y in (20, 160) for x in (20, 160)] == [0, 60, 120, 180]
    common.image_grid(images, ["two red circles above a blue square"] * 4, tmp_path / "grid.png",
                      columns=2, titles=["early", "intermediate"])
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height > 280 and grid.width > 280


@pytest.mark.parametrize("text", ["two red circles to the left of a blue square",
                                  "三个绿色的圆形在蓝色的正方形上方"])
def test_lines_fit_and_lose_nothing(text):
    font = common.load_font()
    lines = common.wrap(text, 96, font)
    assert len(lines) > 1 and all(font.getlength(line) <= 96 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_a_falling_curve_is_drawn_as_a_falling_line(tmp_path):
    curve = [(x, 2.0 - x / 100) for x in range(100)]
    common.plot({"loss": curve, "empty": []}, tmp_path / "loss.png", "step", "loss")
    pixels = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)
    blue = np.abs(pixels - [0x2c, 0x5c, 0xd2]).sum(-1) < 30      # the first curve's colour
    begin, end = (np.nonzero(blue[:, x:x + 20])[0].mean() for x in (80, 560))
    assert begin < end - 50                                      # rows count from the top


@pytest.mark.parametrize("low, high", [(0, 1), (20, 2800), (-0.3, 0.4), (70.3, 93), (5e-7, 6e-7)])
def test_ticks_are_round_and_within_the_axis(low, high):
    ticks = common.round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in ticks)
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step)
    assert all(round(tick / step) == pytest.approx(tick / step) for tick in ticks)


def test_ticks_of_logarithms_are_1_2_and_5_times_powers_of_ten():
    assert common.log_ticks(0.04, 1) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert common.log_ticks(10**math.log10(0.2), 2) == pytest.approx([0.2, 0.5, 1, 2])   # rounds up
    assert common.log_ticks(0.07, 0.08) == pytest.approx([0.07, 0.072, 0.074, 0.076, 0.078, 0.08])


# ------------------------------------------------------------------------------------ the command
def test_a_slip_is_one_line_with_status_2_and_ctrl_c_has_130(capsys):
    def slip():
        raise UserError("--size 9 is not a multiple of --patch 2")

    def stop():
        raise KeyboardInterrupt
    for main, status in ((slip, 2), (stop, 130)):
        with pytest.raises(SystemExit) as end:
            common.entry(main)
        assert end.value.code == status
    assert capsys.readouterr().err.endswith(": error: --size 9 is not a multiple of --patch 2\n")
    assert common.entry(lambda: 3) == 3


class PanicException(BaseException):
    """As raised by a Rust library."""


def test_whatever_reading_a_file_raises_is_one_line_but_the_wish_to_stop():
    for error in (KeyError("a"), RecursionError("too deep"), PanicException("no entry found")):
        with pytest.raises(UserError, match="^a.json: .*: copy it again$"):
            with common.reading("a.json", "copy it again"):
                raise error
    for error in (UserError("a slip"), KeyboardInterrupt("stop")):
        with pytest.raises(type(error), match=str(error)):
            with common.reading("a.json", "copy it again"):
                raise error


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_asked_for_again():
    code = """
import ctypes, resource, torch, common

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(2**20) for _ in range(8)]      # 4 MB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL("libc.so.6").mallopt(-3, 2**17)                  # where glibc begins
given_back = page_faults()
common.keep_freed_memory()
page_faults()
print(given_back, page_faults())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             cwd=Path(common.__file__).parent, check=True).stdout
    given_back, kept = map(int, printed.split())
    assert given_back > 1000 and kept < given_back / 20


def test_device_and_precision_are_the_asked_ones():
    cpu = common.pick_device("cpu")
    assert cpu == torch.device("cpu")
    for name in ("tpu", "meta", "hpu", "mkldnn", ""):
        with pytest.raises(UserError, match=f"--device {name}: .*cannot be used here"):
            common.pick_device(name)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with common.autocast(cpu, common.pick_precision(name, cpu)):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
