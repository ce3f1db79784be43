"""The autoencoder is Stable Diffusion's, from whichever file; latents are computed once."""
import copy
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import make_coco, tiny_cfg
from PIL import Image
from safetensors.torch import save_file

import autoencoder
import common
import image_data
from autoencoder import Autoencoder, Latents, sample_latents


def randomized(model):
    """With noise on every parameter, so that no two of them can be confused."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    """Three resolutions, two blocks each; factor 4."""
    torch.manual_seed(0)
    return randomized(Autoencoder((32, 64, 64)))


@pytest.fixture(scope="module")
def tiny():
    """As small as the norms allow: two resolutions, one block each; factor 2."""
    torch.manual_seed(0)
    return randomized(Autoencoder((32, 32), blocks=1))


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1


# -------------------------------------------------------------------------------- the networks
def test_an_image_becomes_a_small_normal_distribution_and_a_sample_of_it_an_image(small, x):
    mean, logvar = small.encode(x)
    assert mean.shape == logvar.shape == (2, 4, 16 // small.factor, 24 // small.factor)
    noise = torch.full(mean.shape, 2.0)
    z = sample_latents(torch.stack([mean, logvar], dim=1), noise)
    assert torch.allclose(z, mean + 2 * logvar.exp()**0.5)
    assert small.decode(z).shape == x.shape


def test_the_log_variance_stays_between_minus_30_and_20(small, x):
    loud = copy.deepcopy(small)
    loud.quant_conv.bias[4:6] = 1e4
    loud.quant_conv.bias[6:] = -1e4
    mean, logvar = loud.encode(x)
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()
    assert torch.equal(mean, small.encode(x)[0])


def test_downsampling_pads_at_the_right_and_at_the_bottom_only():
    down = autoencoder.Downsample(1)
    down.conv.weight.data.zero_()[0, 0, 2, 2] = 1          # the lower right pixel of each window
    down.conv.bias.data.zero_()
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    assert down(x).tolist() == [[[[11, 0], [0, 0]]]]


# ----------------------------------------------------------------------------- published weights
def of_diffusers(dims):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderKL(
        block_out_channels=dims, layers_per_block=2, latent_channels=4, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * len(dims),
        up_block_types=["UpDecoderBlock2D"] * len(dims))


def test_the_default_has_the_published_names_and_sizes():
    with torch.device("meta"):
        model = Autoencoder()
        theirs = of_diffusers((128, 256, 512, 512))
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    converted = autoencoder.convert_keys(theirs.state_dict())
    assert ours == {name: tensor.shape for name, tensor in converted.items()}
    assert len(ours) == 248 and sum(shape.numel() for shape in ours.values()) == 83_653_863
    # names of autoencoder_kl.pth, one of each kind
    assert {"encoder.down.1.block.0.nin_shortcut.weight", "encoder.down.2.downsample.conv.bias",
            "encoder.mid.attn_1.proj_out.weight", "decoder.up.3.upsample.conv.weight",
            "decoder.up.0.block.2.norm1.weight", "quant_conv.weight"} <= set(ours)
    assert ours["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert (model.factor, model.channels) == (8, 4)


def write_layout(layout, theirs, folder):
    """Writes an AutoencoderKL of diffusers in one of the layouts in circulation."""
    if layout == "diffusers":
        theirs.save_pretrained(folder)
        return folder
    if layout == "diffusers before 2023, in a whole pipeline's vae/":
        older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = theirs.state_dict()
        for new, old in older.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        (folder / "vae").mkdir()
        torch.save(tensors, folder / "vae" / "diffusion_pytorch_model.bin")
        return folder
    tensors = autoencoder.convert_keys(theirs.state_dict())
    if layout == "CompVis":
        torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}}, folder / "a.pth")
        return folder / "a.pth"
    whole = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"model.diffusion_model.out.2.weight": torch.zeros(3),
              "cond_stage_model.encoder.x": torch.zeros(3)}
    save_file(whole, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("layout", [
    "diffusers", "diffusers before 2023, in a whole pipeline's vae/", "CompVis",
    "CompVis, in a whole Stable Diffusion file"])
def test_every_layout_loads_and_gives_what_diffusers_gives(x, tmp_path, layout):
    torch.manual_seed(0)
    theirs = randomized(of_diffusers((32, 64, 64)))
    ours = autoencoder.load(write_layout(layout, theirs, tmp_path))
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    moments = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    assert torch.allclose(mean, moments.mean, atol=1e-4)
    assert torch.allclose(logvar, moments.logvar, atol=1e-4)
    assert torch.allclose(ours.decode(mean), theirs.decode(moments.mean).sample, atol=1e-4)


def test_sizes_are_read_off_the_file_and_half_precision_becomes_float32(tmp_path, tiny):
    for model in (tiny, Autoencoder((64,), 3, 8), Autoencoder((32, 64, 32), 2, 3)):
        tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
        save_file(tensors, tmp_path / "a.safetensors")
        loaded = autoencoder.load(tmp_path / "a.safetensors")
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[name].float())


def test_channels_that_do_not_fit_are_refused(tmp_path, tiny, clip_folder):
    save_file(tiny.state_dict(), tmp_path / "a.safetensors")
    pixels = tiny_cfg(clip_folder)
    latents = dataclasses.replace(pixels, clip_x0=False, channels=4,
                                  autoencoder=str(tmp_path / "a.safetensors"))
    assert autoencoder.load_for(pixels, "cpu") is None
    assert autoencoder.load_for(latents, "cpu").channels == 4
    for cfg, channels in ((pixels, 4), (latents, 3)):
        with pytest.raises(common.UserError, match="--autoencoder"):
            autoencoder.load_for(dataclasses.replace(cfg, channels=channels), "cpu")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("what, words", [
    ("nothing", "no file"), ("a cut off file", "cut off"), ("code", "contains code"),
    ("another model", "another model"), ("a wrong shape", "another model"),
    ("a tensor too many", "another model")])
def test_a_bad_file_is_refused_and_its_code_never_runs(tiny, tmp_path, monkeypatch, what, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    tensors = tiny.state_dict()
    contents = {
        "a cut off file": tensors,
        "code": {"state_dict": tensors, "callbacks": Evil()},
        "another model": {"encoder.layers.0.weight": torch.zeros(2)},
        "a wrong shape": tensors | {"decoder.conv_out.bias": torch.zeros(4)},
        "a tensor too many": tensors | {"encoder.down.0.attn.0.q.weight": torch.zeros(4)},
    }
    if what in contents:
        torch.save(contents[what], path)
    if what == "a cut off file":
        path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(common.UserError, match=words) as error:
        autoencoder.load(path)
    assert str(error.value).startswith(f"--autoencoder {path}") and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


# ----------------------------------------------------------------------- latents, computed once
def latents(coco, vae, size=16, split="train", **kwargs):
    return Latents(coco, split, size, vae, folder=coco.parent / "latents", **kwargs)


def latents_file(coco):
    return coco.parent / "latents" / "coco-train-16" / "latents.npy"


def interrupt(*_):
    raise KeyboardInterrupt


def test_row_i_is_what_the_encoder_gives_of_image_i(coco, tiny):
    dataset = latents(coco, tiny)
    pixels = image_data.CaptionedImages(coco, "train", 16)
    assert len(dataset) == 12 and dataset.items == pixels.items
    for i in range(12):
        expected = torch.cat(tiny.encode(image_data.to_float(pixels.image(i)[None])))
        assert dataset.image(i).shape == (2, 4, 8, 8) and dataset.image(i).dtype == torch.float16
        assert torch.allclose(dataset.image(i).float(), expected, rtol=2**-10, atol=1e-3)


def test_batches_hold_latents_in_the_place_of_images(coco, tiny):
    dataset = latents(coco, tiny)
    pixels = image_data.CaptionedImages(coco, "train", 16)
    pairs = zip(image_data.batches(dataset, 4, 0, 4, seed=0),
                image_data.batches(pixels, 4, 0, 4, seed=0))
    for (moments, captions), (_, same_captions) in pairs:
        numbers = [int(caption.split()[1]) for caption in captions]
        assert captions == same_captions
        assert torch.equal(moments, torch.stack([dataset.image(i) for i in numbers]))


def test_a_choice_of_items_finds_its_rows_by_path(coco, tiny):
    dataset = latents(coco, tiny)
    chosen = [(path, ["another text"], {}) for path, _, _ in (dataset.items[7], dataset.items[2])]
    choice = latents(coco, tiny, items=chosen)
    assert choice.items == chosen and len(choice) == 2
    assert torch.equal(choice.image(0), dataset.image(7))
    assert choice[1, 0][1] == "another text"


def test_images_are_encoded_once(coco, tiny, monkeypatch):
    first = latents(coco, tiny)
    monkeypatch.setattr(Autoencoder, "encode", interrupt)
    assert torch.equal(latents(coco, tiny).image(5), first.image(5))
    other_decoder = copy.deepcopy(tiny)
    other_decoder.decoder.conv_out.bias += 1               # no latent depends on it
    latents(coco, other_decoder)
    moved = shutil.copytree(coco, coco.parent / "moved" / "coco")
    Latents(moved, "train", 16, tiny, folder=coco.parent / "latents")


def test_an_interrupted_encoding_leaves_nothing_and_starts_again(coco, tiny, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Autoencoder, "encode", interrupt)
        latents(coco, tiny)
    assert not list(latents_file(coco).parent.iterdir())
    assert len(latents(coco, tiny)) == len(np.load(latents_file(coco))) == 12


@pytest.mark.parametrize("what", ["files", "encoder", "split"])
def test_latents_of_something_else_are_refused(coco, tiny, what):
    latents(coco, tiny)
    vae = copy.deepcopy(tiny)
    split = "train"
    if what == "files":
        Image.new("RGB", (50, 50)).save(coco / "train2017" / "000000000003.jpg")
    elif what == "encoder":
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1
    else:
        split = "val"
        latents_file(coco).parent.rename(coco.parent / "latents" / "coco-val-16")
    with pytest.raises(common.UserError, match=f"{what} differs.*delete it"):
        latents(coco, vae, split=split)


def test_a_damaged_file_a_full_disk_and_a_wrong_size_are_refused(coco, tiny, monkeypatch):
    with pytest.raises(common.UserError, match="multiple of 2"):
        latents(coco, tiny, size=15)
    with monkeypatch.context() as patch, pytest.raises(common.UserError, match="disk has left"):
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 12 * 2 * 4))
        latents(coco, tiny)
    assert not list(latents_file(coco).parent.iterdir())
    latents(coco, tiny)
    latents_file(coco).write_bytes(latents_file(coco).read_bytes()[:-100])
    with pytest.raises(common.UserError, match="damaged"):
        latents(coco, tiny)


def test_names_may_be_absolute_and_a_link_to_nothing_is_a_broken_image(tmp_path, tiny):
    root = tmp_path / "data"
    root.mkdir()
    lines = []
    for i in range(120):
        path = tmp_path / f"{i}.png"                       # outside the data's folder
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        lines.append(json.dumps({"file_name": str(path), "text": f"picture {i}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    assert torch.isfinite(latents(root, tiny, size=8).image(3)).all()
    for i in range(120):
        (root / f"{i}.png").symlink_to(tmp_path / ("gone" if i == 7 else f"{i}.png"))
        (root / f"{i}.txt").write_text("a caption")
    (root / "metadata.jsonl").unlink()
    shutil.rmtree(tmp_path / "latents")
    dataset = latents(root, tiny, size=8)
    assert [path.name for path, _, _ in dataset.items].index("7.png") in dataset.broken
    assert len(dataset.broken) == 1


def test_a_broken_image_is_left_out_and_more_than_one_per_cent_are_refused(tmp_path, tiny):
    coco = make_coco(tmp_path / "coco", train=101, val=1)
    broken = coco / "train2017" / "000000000097.jpg"       # in the last batch, which is smaller
    broken.write_bytes(b"no image")
    for _ in range(2):                                     # as it is encoded and as it is opened
        dataset = latents(coco, tiny, size=4)
        with pytest.raises(image_data.BrokenImage, match="000000000097"):
            dataset.image(97)
        _, caption, replaced = dataset[97, 0]
        assert replaced.startswith(str(broken)) and not caption.startswith("picture 97 ")
    last = image_data.CaptionedImages(coco, "train", 4).image(100)
    expected = torch.cat(tiny.encode(image_data.to_float(last[None])))
    assert torch.allclose(dataset.image(100).float(), expected, rtol=2**-10, atol=1e-3)
    (coco / "train2017" / "000000000008.jpg").write_bytes(b"no image")
    shutil.rmtree(tmp_path / "latents")
    with pytest.raises(common.UserError, match="more than 1 %"):
        latents(coco, tiny, size=4)
