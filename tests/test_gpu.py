"""On a GPU no script lets tensors of two devices meet: shown without one, on that of gpu.py."""
import numpy as np
import pytest
import torch
from conftest import TINY, make_coco, run, tiny_pipeline
from gpu import DEVICE

import uvit_fusion
from autoencoder import Autoencoder
from encoders import TextEncoder
from image_data import CaptionedImages
from toy import models


def test_tensors_of_two_devices_meet_only_where_a_real_gpu_allows_it(pretended_gpu):
    ours = torch.arange(3.0)
    theirs = torch.arange(3.0, device=DEVICE)
    assert (theirs + 1).cpu().tolist() == [1, 2, 3]
    assert (theirs * torch.tensor(2.0)).tolist() == [0, 2, 4]           # has no dimension
    assert theirs[torch.tensor([2, 0])].tolist() == [2, 0]              # the index may be ours
    theirs[ours > 1] = 5
    assert theirs.to("cpu").numpy().tolist() == [0, 1, 5]
    for slip in (lambda: ours + theirs, lambda: torch.cat([ours, theirs]), lambda: theirs.numpy(),
                 lambda: np.asarray(theirs), lambda: ours[theirs.long()],
                 lambda: torch.randn(3, device=DEVICE, generator=torch.Generator())):
        with pytest.raises((RuntimeError, TypeError)):
            slip()
    linear = torch.nn.Linear(3, 1).to(DEVICE)
    linear(theirs).sum().backward()
    assert linear.weight.grad.device == DEVICE
    assert linear.weight.grad.tolist() == [[0, 1, 5]]


def test_a_u_vit_is_trained_resumed_sampled_and_graded(
        pretended_gpu, tmp_path, toy_data, clip_folder):
    def works(*command):
        status, _, errors = run(*command, cwd=tmp_path)
        assert status == 0, errors

    training = ["uvit_fusion.py", "--train", "--data", toy_data, "--clip", clip_folder, *TINY,
                "--size", 24, "--patch", 8, "--decay", 0, "--noise-first", 0, "--samples", 8,
                "--validation-samples", 0, "--out", "runs/uvit_fusion"]
    works(*training, "--steps", 2)
    works(*training, "--steps", 3, "--resume")
    works("sample.py", "two red circles", "--trajectory", "--sample-steps", 2, "--sampler", "dpm")
    works("eval.py", "--by-noise", "--samples", 8)
    works("eval.py", "--quality", "--samples", 8, "--sample-steps", 2)
    works("experiments.fusion", "analyse", "--run", "runs/uvit_fusion", "--samples", 8)


def test_images_and_validation_losses_are_those_of_the_cpu(pretended_gpu, coco, clip_folder):
    dataset = CaptionedImages(coco, "val", 8)
    figures = []
    images = []
    for device in (torch.device("cpu"), DEVICE):
        pipeline = tiny_pipeline(clip_folder)
        text_encoder = TextEncoder(clip_folder, device)
        pipeline = uvit_fusion.Pipeline(
            pipeline.model.to(device), text_encoder, pipeline.cfg, device, torch.float32)
        figures.append(pipeline.loss(dataset).item())
        images.append(pipeline.generate(["a man", "a horse"], steps=3).astype(float))
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert np.abs(images[0] - images[1]).max() <= 1
    drawn = [torch.randn(9, device=device).cpu() for device in ("cpu", DEVICE)]
    assert not torch.equal(*drawn)                       # though a GPU draws other noise


def test_latents_are_learned_and_decoded(pretended_gpu, tmp_path, clip_folder):
    make_coco(tmp_path / "coco")
    torch.save(Autoencoder((32, 32), blocks=1).state_dict(), tmp_path / "vae.pth")
    status, _, errors = run(
        "uvit_fusion.py", "--train", "--data", "coco", "--clip", clip_folder, *TINY, "--size", 16,
        "--channels", 4, "--autoencoder", "vae.pth", "--no-clip-x0", "--accumulate", 2,
        "--recompute", "--fusion", "cross", "--steps", 2, "--out", "run", cwd=tmp_path)
    assert status == 0, errors


@pytest.mark.parametrize("name", ["clip", "llm", "captioner", "segmenter"])
def test_the_toy_models_are_trained(pretended_gpu, tmp_path, toy_data, name):
    size = {"tokens": 400} if name == "llm" else {"batch_size": 8}
    folder = getattr(models, name)(toy_data, tmp_path / name, steps=2, **size)
    assert (folder / "model.safetensors").exists()
    if name == "llm":
        models.instructed_llm(toy_data, tmp_path / "instructed", folder, steps=2, tokens=400)
