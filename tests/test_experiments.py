"""What the experiments measure: the paper's costs, and the rank of attention to text."""
import dataclasses

import pytest
import torch
from conftest import tiny_pipeline

from experiments import fusion
from uvit_fusion import PRESETS, Config


@pytest.mark.parametrize("attends, v, c, giga_macs", [
    ("concat", 0, 0, 16.23), ("concat", 3, 3, 15.12), ("concat", 4, 1, 14.01),
    ("concat", 5, 1, 13.39), ("concat", 6, 2, 13.02), ("cross", 0, 0, 13.02),
    ("cross", 3, 3, 13.40), ("cross", 3, 1, 12.91)])
def test_variants_cost_at_the_papers_size_what_the_released_code_does(
        attends, v, c, giga_macs, monkeypatch):
    random_inputs = fusion.random_inputs                         # meta: shapes only, no numbers
    monkeypatch.setattr(fusion, "random_inputs", lambda *args: random_inputs(*args[:2], "meta"))
    cfg = Config(**PRESETS["coco"] | dict(fusion=attends, image_blocks=v, caption_blocks=c))
    with torch.device("meta"):
        flops = fusion.forward_flops(cfg)
    assert flops / 2e9 == pytest.approx(giga_macs, abs=0.02)     # a multiply-add is two


def test_the_effective_rank_counts_directions():
    assert fusion.effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert fusion.effective_rank(torch.ones(3, 4)).item() == pytest.approx(1, abs=1e-6)
    # exp of the entropy of (2/3, 1/3), the singular values and not their squares
    matrices = torch.stack([torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)])
    assert fusion.effective_rank(matrices).tolist() == pytest.approx([1.8899, 2], abs=1e-4)


@pytest.mark.parametrize("attends, patches, text", [  # rows and columns of the attention
    ("concat", slice(17, 21), slice(1, 17)), ("cross", slice(1, 5), slice(5, 21))])
def test_attention_to_text_is_that_of_patches_to_tokens(clip_folder, attends, patches, text):
    pipeline = tiny_pipeline(clip_folder, fusion=attends)
    denoise = pipeline.model.denoise
    seen = []
    pipeline.model.denoise = lambda *args, **more: seen.append(denoise(*args, **more)) or seen[0]
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    maps, mask = fusion.text_attention(pipeline, images, ["a man", "two red circles"], 500)
    for shares, logits in zip(maps, seen[0][1], strict=True):
        assert torch.equal(shares, logits.softmax(-1)[:, :, patches, text])
        assert not shares.masked_select(~mask[:, None, None]).any()            # on padding


def test_intervals_over_seeds_are_students():
    assert fusion.seed_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)


def test_costs_are_of_equal_steps(clip_folder):
    base = Config(size=8, dim=32, depth=4, heads=2, batch_size=4)
    variants = {name: dataclasses.replace(base, image_blocks=v) for name, v in (
        ("early", 0), ("intermediate", 2))}
    costs = fusion.step_costs(variants, 4, torch.device("cpu"), torch.float32, rounds=2)
    assert costs["intermediate"]["gflops"] < costs["early"]["gflops"]
    assert all(cost["ms"] > 0 and cost["sample_ms"] > 0 for cost in costs.values())
