"""The autoencoder is Stable Diffusion's, from whichever file it comes, and the latents on disk are those it would give again."""
import copy
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import make_coco
from PIL import Image
from safetensors.torch import save_file

import autoencoder
import common
from autoencoder import Autoencoder, Latents, draw_latents


def randomized(model, seed=0):
    """With every parameter at random, so that no two can be taken for each other."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    """Three resolutions, of 32, 64 and 64 channels; two blocks."""
    torch.manual_seed(0)
    return randomized(Autoencoder(32, (1, 2, 2)))


@pytest.fixture(scope="module")
def tiny():
    """As little as the norms allow: factor 2, one block."""
    torch.manual_seed(1)
    return randomized(Autoencoder(32, (1, 1), blocks=1))


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1


# ------------------------------------------------------------------------------------------------------------ the networks
def published_names():
    """The names in CompVis's file, spelt out."""
    def block(name, shortcut):
        return [f"{name}.{part}" for part in ["norm1", "conv1", "norm2", "conv2"] + ["nin_shortcut"] * shortcut]
    names = ["quant_conv", "post_quant_conv"]
    for half in ("encoder", "decoder"):
        names += [f"{half}.{part}" for part in ("conv_in", "norm_out", "conv_out")]
        names += block(f"{half}.mid.block_1", False) + block(f"{half}.mid.block_2", False)
        names += [f"{half}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
    for i in range(4):
        for j in range(2):
            names += block(f"encoder.down.{i}.block.{j}", j == 0 and i in (1, 2))
        for j in range(3):
            names += block(f"decoder.up.{i}.block.{j}", j == 0 and i in (0, 1))
    names += [f"encoder.down.{i}.downsample.conv" for i in (0, 1, 2)] + [f"decoder.up.{i}.upsample.conv" for i in (1, 2, 3)]
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_the_default_has_the_published_names_and_sizes():
    with torch.device("meta"):
        model = Autoencoder()
    assert set(model.state_dict()) == published_names() and len(published_names()) == 248
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert model.factor == 8 and model.channels == 4
    assert {(m.num_groups, m.eps) for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {(32, 1e-6)}


def test_shapes_and_the_range_of_the_log_variance(small, x):
    mean, logvar = small.encode(x)
    assert small.factor == 4 and mean.shape == logvar.shape == (2, 4, 4, 6)
    assert small.decode(mean).shape == x.shape
    loud = copy.deepcopy(small)
    loud.quant_conv.bias[4:6], loud.quant_conv.bias[6:] = 1e4, -1e4
    logvar = loud.encode(x)[1]
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


def test_downsampling_pads_at_the_right_and_below_only():
    down = autoencoder.Downsample(1)
    down.conv.weight.data.zero_()[0, 0, 2, 2] = 1                     # picks the lower right pixel of each window
    down.conv.bias.data.zero_()
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    assert down(x).tolist() == [[[[11, 0], [0, 0]]]]


def test_attention_is_the_softmax_of_its_definition():
    layer = randomized(autoencoder.Attention(32))
    x = torch.randn(2, 32, 3, 5, generator=torch.Generator().manual_seed(0))
    q, k, v = (part(layer.norm(x)).flatten(2) for part in (layer.q, layer.k, layer.v))       # (B, C, N)
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(-1)
    assert torch.allclose(layer(x), x + layer.proj_out((v @ weights.transpose(1, 2)).view_as(x)), atol=1e-5)


def test_a_draw_has_the_mean_and_the_variance_that_were_stored():
    moments = torch.stack([torch.full((2000, 4, 2, 2), 3.0), torch.full((2000, 4, 2, 2), -2.0)], dim=1).half()
    noise = torch.randn(moments[:, 0].shape, generator=torch.Generator().manual_seed(0))
    z = draw_latents(moments, noise)
    assert z.shape == (2000, 4, 2, 2) and z.dtype == torch.float32
    assert abs(z.mean() - 3) < 0.01 and abs(z.var().log() + 2) < 0.03
    moments[:, 1] = -30
    assert torch.allclose(draw_latents(moments, noise), moments[:, 0].float(), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------- files
NEW = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}


def as_diffusers(tensors, attention):
    """CompVis's names and shapes -> those of diffusers, the way back from what the autoencoder does on loading."""
    levels, renamed = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down.")}), {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "down":
            parts[1:4] = ["down_blocks", parts[2], "resnets" if parts[3] == "block" else "downsamplers.0"]
        elif parts[1] == "up":
            parts[1:4] = ["up_blocks", str(levels - 1 - int(parts[2])), "resnets" if parts[3] == "block" else "upsamplers.0"]
        elif parts[1] == "mid" and parts[2] == "attn_1":
            parts[1:4] = ["mid_block", "attentions", "0", attention[parts[3]]]
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        elif parts[1] == "mid":
            parts[1:3] = ["mid_block", "resnets", "0" if parts[2] == "block_1" else "1"]
        elif parts[1] == "norm_out":
            parts[1] = "conv_norm_out"
        renamed[".".join(parts).replace("nin_shortcut", "conv_shortcut")] = tensor.contiguous()
    return renamed


def write(layout, tensors, folder):
    """Writes the tensors in one of the layouts in circulation; returns the path to load."""
    if layout == "CompVis, .pth":
        torch.save(tensors, folder / "a.pth")
        return folder / "a.pth"
    if layout == "CompVis, .pth as before PyTorch 1.6":
        torch.save(tensors, folder / "a.pth", _use_new_zipfile_serialization=False)
        return folder / "a.pth"
    if layout == "CompVis, with the loss and the state of its training":
        torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}, "epoch": 3, "lr_schedulers": []}, folder / "a.ckpt")
        return folder / "a.ckpt"
    if layout == "whole Stable Diffusion":
        others = {"model.diffusion_model.out.2.weight": torch.zeros(3), "cond_stage_model.transformer.text_model.encoder.x": torch.zeros(3),
                  "encoder.conv_in.weight": torch.zeros(3), "model_ema.decay": torch.zeros(())}
        save_file({f"first_stage_model.{name}": tensor for name, tensor in tensors.items()} | others, folder / "a.safetensors")
        return folder / "a.safetensors"
    if layout == "diffusers":
        save_file(as_diffusers(tensors, NEW), folder / "diffusion_pytorch_model.safetensors")
        return folder
    if layout == "diffusers, older spelling, in vae/":
        (folder / "vae").mkdir()
        torch.save(as_diffusers(tensors, OLD), folder / "vae" / "diffusion_pytorch_model.bin")
        return folder
    if layout == "diffusers, a file by another name":
        save_file(as_diffusers(tensors, NEW), folder / "vae.safetensors")
        return folder / "vae.safetensors"


@pytest.mark.parametrize("layout", [
    "CompVis, .pth", "CompVis, .pth as before PyTorch 1.6", "CompVis, with the loss and the state of its training", "whole Stable Diffusion",
    "diffusers", "diffusers, older spelling, in vae/", "diffusers, a file by another name"])
def test_every_layout_loads_to_the_same_outputs(small, x, tmp_path, layout):
    before = torch.get_rng_state()
    loaded = autoencoder.load(write(layout, small.state_dict(), tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(x), small.encode(x)))
    z = small.encode(x)[0]
    assert torch.equal(loaded.decode(z), small.decode(z))


@pytest.mark.parametrize("sizes", [(32, (1, 1), 1, 4), (32, (1, 2, 2), 2, 8), (64, (1,), 3, 4)])
def test_the_widths_are_read_from_the_file(tmp_path, sizes):
    model = Autoencoder(*sizes)
    save_file(as_diffusers(model.state_dict(), OLD), tmp_path / "a.safetensors")
    loaded = autoencoder.load(tmp_path / "a.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    assert (loaded.factor, loaded.channels) == (model.factor, sizes[3])


def test_half_precision_files_load_as_float32(tiny, x, tmp_path):
    save_file({name: tensor.half() for name, tensor in tiny.state_dict().items()}, tmp_path / "a.safetensors")
    loaded = autoencoder.load(tmp_path / "a.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded.encode(x)[0], tiny.encode(x)[0], atol=0.02)


def of_diffusers(small):
    diffusers = pytest.importorskip("diffusers")
    widths = (32, 64, 64) if small else (128, 256, 512, 512)
    return diffusers.AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=32,
                                   down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_equals_the_model_of_diffusers_through_its_files(x, tmp_path, kind):
    torch.manual_seed(0)
    theirs = randomized(of_diffusers(small=True))
    theirs.save_pretrained(tmp_path, safe_serialization=kind == "safetensors")
    assert (tmp_path / f"diffusion_pytorch_model.{kind}").exists()
    ours = autoencoder.load(tmp_path)
    moments = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    assert torch.allclose(mean, moments.mean, atol=1e-4) and torch.allclose(logvar, moments.logvar, atol=1e-4)
    assert torch.allclose(ours.decode(mean), theirs.decode(moments.mean).sample, atol=1e-4)


def test_the_default_has_the_names_and_shapes_of_diffusers():
    with torch.device("meta"):
        ours, theirs = Autoencoder().state_dict(), autoencoder.convert_keys(of_diffusers(small=False).state_dict())
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in theirs.items()}


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def bad_file(how, tensors, folder):
    path = folder / ("a.safetensors" if "safetensors" in how else "a.pth")
    if how in ("cut off .pth", "cut off .safetensors", "cut off old .pth"):
        if path.suffix == ".pth":
            torch.save(tensors, path, _use_new_zipfile_serialization="old" not in how)
        else:
            save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:50_000])
    elif how == "with code":
        torch.save({"state_dict": tensors, "callbacks": Evil()}, path)
    elif how == "code alone":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif how == "a web page":
        path.write_text("<html>404</html>")
    elif how == "empty":
        path.touch()
    elif how == "no dictionary":
        torch.save([1, 2], path)
    elif how == "another model":
        torch.save({"encoder.layers.0.weight": torch.zeros(2, 2)}, path)
    elif how == "missing tensors":
        torch.save({name: tensor for name, tensor in tensors.items() if "mid" not in name}, path)
    elif how == "a wrong shape":
        torch.save(tensors | {"decoder.conv_out.bias": torch.zeros(4)}, path)
    elif how == "an impossible width":
        torch.save(tensors | {"encoder.conv_in.weight": torch.zeros(20, 3, 3, 3)}, path)
    elif how == "a tensor too many":
        torch.save(tensors | {"encoder.down.0.attn.0.q.weight": torch.zeros(4)}, path)
    elif how == "a folder without":
        return folder
    return path


@pytest.mark.parametrize("how, words", [
    ("missing", "no file"), ("a folder without", "no file"), ("cut off .pth", "cut off"), ("cut off old .pth", "cut off"),
    ("cut off .safetensors", "cut off"), ("a web page", "cut off"), ("empty", "cut off"), ("no dictionary", "no file of tensors"),
    ("with code", "holds code"), ("code alone", "holds code"), ("another model", "something else"), ("missing tensors", "mid"),
    ("a wrong shape", "decoder.conv_out.bias"), ("an impossible width", "something else"), ("a tensor too many", "attn")])
def test_a_bad_file_is_refused_in_one_line(tiny, tmp_path, monkeypatch, how, words):
    monkeypatch.chdir(tmp_path)
    path = bad_file(how, tiny.state_dict(), tmp_path)
    with pytest.raises(common.UserError, match=re.escape(words)) as error:
        autoencoder.load(path)
    assert str(error.value).startswith(f"--autoencoder {path}") and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


# ----------------------------------------------------------------------------------------------------------------- latents
@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "coco")


def latents(coco, model, size=16, split="train", batch=3, **more):
    return Latents(coco, split, size, model, "a.pth", folder=coco.parent / "latents", batch=batch, **more)


def encoded(monkeypatch, interrupt_at=None):
    """Counts the pictures that are encoded from now on; the batch of number `interrupt_at` meets a Ctrl-C."""
    counts, encode = [], Autoencoder.encode

    def counting(self, x):
        if len(counts) == interrupt_at:
            raise KeyboardInterrupt
        counts.append(len(x))
        return encode(self, x)
    monkeypatch.setattr(Autoencoder, "encode", counting)
    return counts


def test_rows_are_what_the_encoder_gives(coco, tiny):
    dataset, pixels = latents(coco, tiny), common.CaptionedImages(coco, "train", 16)
    assert len(dataset) == len(pixels) == 12 and dataset.items == pixels.items
    for i in range(12):
        row, direct = dataset.picture(i), torch.cat(tiny.encode(common.to_float(pixels.picture(i)[None])))
        assert row.shape == (2, 4, 8, 8) and row.dtype == torch.float16
        assert torch.allclose(row.float(), direct, rtol=2**-10, atol=1e-4)
    file = np.load(coco.parent / "latents" / "coco-train-16" / "latents.npy", mmap_mode="r")
    assert file.shape == (12, 2, 4, 8, 8) and file.dtype == np.float16


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_are_those_of_the_pictures_with_latents_in_their_place(coco, tiny, workers):
    dataset, pixels = latents(coco, tiny), common.CaptionedImages(coco, "train", 16)
    loader = common.batches(dataset, 4, 0, 4, seed=0, workers=workers)
    assert loader.num_workers == (workers or 0)
    for (moments, captions, broken), (_, same, _) in zip(loader, common.batches(pixels, 4, 0, 4, seed=0)):
        assert moments.shape == (4, 2, 4, 8, 8) and moments.dtype == torch.float16 and captions == same and not broken
        number = [int(caption.split()[1]) for caption in captions]
        assert torch.equal(moments, torch.stack([dataset.picture(i) for i in number]))
    assert not dataset.cache


def test_a_pickled_data_set_carries_no_latents(coco, tiny):
    dataset = latents(coco, tiny, size=64)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < (coco.parent / "latents" / "coco-train-64" / "latents.npy").stat().st_size / 4
    assert torch.equal(pickle.loads(pickled).picture(5), dataset.picture(5))


def test_it_is_encoded_once(coco, tiny, monkeypatch, capfd):
    counts = encoded(monkeypatch)
    first = latents(coco, tiny)
    assert counts == [3, 3, 3, 3] and "encoding" in capfd.readouterr().err
    again = latents(coco, tiny)
    assert len(counts) == 4 and "encoding" not in capfd.readouterr().err
    assert all(torch.equal(first.picture(i), again.picture(i)) for i in range(12))
    other = copy.deepcopy(tiny)
    other.decoder.conv_out.bias += 1
    latents(coco, other)                                              # the decoder has no part in it
    moved = shutil.copytree(coco, coco.parent / "moved" / "coco")
    Latents(moved, "train", 16, tiny, "a.pth", folder=coco.parent / "latents")
    assert len(counts) == 4
    assert len(latents(coco, tiny, split="val")) == 4 and counts[4:] == [3, 1]


@pytest.mark.parametrize("at", [0, 2])
def test_resumed_equals_uninterrupted_byte_for_byte(coco, tiny, monkeypatch, at):
    latents(coco, tiny)
    file = coco.parent / "latents" / "coco-train-16" / "latents.npy"
    whole = file.read_bytes()
    shutil.rmtree(coco.parent / "latents")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        encoded(patch, interrupt_at=at)
        latents(coco, tiny)
    assert json.loads((file.parent / "latents.json").read_text())["done"] == 3 * at and file.read_bytes() != whole
    counts = encoded(monkeypatch)
    latents(coco, tiny)
    assert sum(counts) == 12 - 3 * at and file.read_bytes() == whole
    assert not list(file.parent.glob("*.unfinished"))


def test_rows_beyond_the_last_save_are_encoded_again_after_a_crash(coco, tiny):
    latents(coco, tiny)
    file = coco.parent / "latents" / "coco-train-16" / "latents.npy"
    whole, note = file.read_bytes(), common.read_json(file.with_name("latents.json"))
    np.load(file, mmap_mode="r+")[7:] = 9                             # written in part, and not noted
    common.write_json(file.with_name("latents.json"), note | {"done": 6})
    latents(coco, tiny)
    assert file.read_bytes() == whole


def change(what, coco, tiny, folder):
    """Makes the latents in the folder those of something else; returns the arguments to open it with."""
    size, split, model = 16, "train", tiny
    if what == "a picture":
        Image.new("RGB", (50, 50)).save(coco / "train2017" / "000000000003.jpg")
    elif what == "fewer pictures":
        notes = common.read_json(coco / "annotations" / "captions_train2017.json")
        common.write_json(coco / "annotations" / "captions_train2017.json", notes | {"images": notes["images"][:11]})
    elif what == "the encoder":
        model = copy.deepcopy(tiny)
        model.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    elif what == "the size":
        size = 32
        folder.rename(folder.with_name("coco-train-32"))
    elif what == "the split":
        split = "val"
        folder.rename(folder.with_name("coco-val-16"))
    elif what == "rows lost":
        (folder / "latents.npy").unlink()
    elif what == "rows cut off":
        (folder / "latents.npy").write_bytes((folder / "latents.npy").read_bytes()[:-100])
    elif what == "rows of another shape":
        np.save(folder / "latents.npy", np.zeros((12, 2, 4, 9, 9), np.float16))
    elif what == "note cut off":
        (folder / "latents.json").write_text("{")
    return coco, model, size, split


@pytest.mark.parametrize("what, word", [
    ("a picture", "files"), ("fewer pictures", "pictures"), ("the encoder", "encoder"), ("the size", "size"), ("the split", "split"),
    ("rows lost", "damaged"), ("rows cut off", "damaged"), ("rows of another shape", "damaged"), ("note cut off", "JSON")])
def test_latents_of_something_else_are_refused(coco, tiny, what, word):
    latents(coco, tiny)
    with pytest.raises(common.UserError, match=word) as error:
        latents(*change(what, coco, tiny, coco.parent / "latents" / "coco-train-16"))
    assert str(coco.parent / "latents" / "coco-") in str(error.value) and "\n" not in str(error.value)
    assert what == "note cut off" or "delete" in str(error.value) and "--latents" in str(error.value)


def test_a_size_that_is_no_multiple_of_the_factor_is_refused(coco, tiny):
    with pytest.raises(common.UserError, match="multiple of 2"):
        latents(coco, tiny, size=15)
    assert not (coco.parent / "latents").exists()


def test_a_full_disk_is_found_before_anything_is_written(coco, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(common.UserError, match="--latents"):
        latents(coco, tiny)
    assert not list((coco.parent / "latents").rglob("latents.*"))


@pytest.fixture
def hundreds(tmp_path):
    """A folder of 210 pictures for training, one of them broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(222):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture {i}")
    (folder / "007.png").write_bytes(b"\x89PNG broken")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_noted_replaced_and_reported(hundreds, tiny, capsys, workers):
    for _ in range(2):                                                # as it was encoded, and as it is opened again
        dataset = latents(hundreds, tiny, size=8, batch=64)
        (number,) = common.read_json(dataset.path.with_name("latents.json"))["broken"]
        assert dataset.items[number][0].name == "007.png"
        with pytest.raises(OSError, match="007.png"):
            dataset.picture(number)
    assert capsys.readouterr().out.count("007.png") == 1
    unread, captions = set(), []
    for moments, texts, broken in common.batches(dataset, 10, 0, 22, seed=0, workers=workers):
        assert moments.shape == (10, 2, 4, 4, 4)
        unread |= set(broken)
        captions += texts
    assert unread == {str(hundreds / "007.png")} and "picture 7" not in captions


def test_more_than_one_per_cent_of_broken_pictures_stops(hundreds, tiny):
    for i in (8, 9, 150):
        (hundreds / f"{i:03d}.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(common.UserError, match="more than 1 %"):
            latents(hundreds, tiny, size=8, batch=16)
