"""What the experiments measure: the paper's costs, and the rank of attention to text."""
import dataclasses
import math

import pytest
import torch
from conftest import TINY, refused, run, tiny_pipeline

import common
from experiments import fusion
from uvit_fusion import PRESETS, Config, UViT


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


def test_controls_differ_from_intermediate_fusion_in_one_thing():
    cfgs = {name: Config(**PRESETS["deep"] | change) for name, change in fusion.VARIANTS.items()}
    sizes = {}
    for name, cfg in cfgs.items():
        with torch.device("meta"):
            sizes[name] = sum(parameter.numel() for parameter in UViT(cfg).parameters())
    assert (cfgs["v0c2"].image_blocks, cfgs["v0c2"].caption_blocks) == (0, 2)
    assert sizes["v0c2"] == sizes["intermediate"]              # early joining alone differs
    assert (cfgs["v2c0"].image_blocks, cfgs["v2c0"].caption_blocks) == (2, 0)
    assert sizes["v2c0"] == sizes["early"] < 0.8 * sizes["intermediate"]
    deeper = dataclasses.replace(cfgs["early"], depth=cfgs["early"].depth + 2)
    assert cfgs["early_deeper"] == deeper                      # nine blocks, as in intermediate
    assert sizes["early_deeper"] == pytest.approx(sizes["intermediate"], rel=0.03)


@pytest.mark.parametrize("curve, step", [
    ([[0, 0], [100, 60], [200, 80]], 150),                     # half of the way from 60 to 80
    ([[0, 0], [100, 140]], 50),
    ([[0, 0], [100, 70], [200, 90]], 100),
    ([[0, 0], [100, 72], [200, 60], [300, 80]], 100 * 70 / 72),          # the first time
    ([[0, 0], [100, 60], [200, 69.9]], math.nan),
])
def test_the_step_of_equal_accuracy_lies_on_the_line_between_two_measured_steps(curve, step):
    assert fusion.time_until(curve, 70) == pytest.approx(step, nan_ok=True)


def test_comparisons_are_by_seed_and_hold_no_figure_that_is_not_known(tmp_path, monkeypatch):
    right = {"early": (70, 67), "intermediate": (72, 71), "v0c2": (71, 70), "v2c0": (70, 70)}
    last = {"early": (60, 60), "intermediate": (80, 100), "v0c2": (60, 90), "v2c0": (75, 75)}

    def trained(cfg, data, folder, *rest):
        name, seed = folder.name.split("-")
        assert cfg == Config(**fusion.VARIANTS[name], seed=int(seed), steps=80,
                             snapshot_at=(40, 50, 60, 70, 80))
        fields = dict.fromkeys(("all_unseen", "count", "relation"), 0)
        curve = [[0, 0], [40, 50], [80, last[name][int(seed)]]]
        return fields | {"all": right[name][int(seed)], "curve": curve}
    monkeypatch.setattr(fusion, "TARGET", 70)
    monkeypatch.setattr(fusion, "train_variant", trained)
    monkeypatch.setattr(fusion, "step_costs", lambda variants, *rest: {
        name: dict(parameters=7, gflops=1.0, ms=500.0) for name in variants})
    monkeypatch.setattr(fusion, "draw_variants", lambda *args: None)
    monkeypatch.setattr(fusion.toy, "prepare", lambda *args: "data")
    status, out, errors = run("experiments.fusion", "compare", "--steps", 80, "--seeds", 2,
                              "--variants", *right, cwd=tmp_path)
    assert status == 0, errors
    found = common.read_json(tmp_path / "runs" / "compare" / "results.json")
    assert (tmp_path / "runs" / "compare" / "curves.png").exists()
    assert found["v0c2_all"] == 70.5 and found["v2c0_all"] == 70
    assert found["intermediate_all_ci"] == pytest.approx(12.706 * 0.5, rel=1e-4)
    # 72 - 70 and 71 - 67; 72 - 71 and 71 - 70
    assert found["difference"] == 3 and found["seeds"] == 2
    assert found["difference_ci"] == pytest.approx(12.706, rel=1e-4)
    assert found["difference_v0c2"] == 1 and found["difference_v0c2_ci"] == 0
    # its curves end at 80 and 100, their mean at 90
    assert found["intermediate_steps_to_70"] == 60
    assert found["intermediate_seconds_to_70"] == 30
    assert found["intermediate_steps_to_70_ci"] == pytest.approx(12.706 * (200 / 3 - 56) / 2, 1e-4)
    # of v0c2 only one seed gets to 70, but the mean does; early fusion does not
    assert found["v0c2_steps_to_70"] == pytest.approx(72)
    assert "v0c2_steps_to_70_ci" not in found
    assert "early_steps_to_70" not in found and "early_seconds_to_70" not in found


def test_a_finished_variant_is_kept_with_its_curve(tmp_path, toy_data, clip_folder, monkeypatch):
    monkeypatch.setattr(fusion, "CURVE_SCENES", slice(32, 40))
    grade_images = fusion.judge.grade_images
    load_pipeline = fusion.uvit_fusion.load_pipeline
    graded = []
    loaded = []

    def grade(images, scenes, unseen):
        graded.append(scenes)
        return grade_images(images, scenes, unseen)

    def load(path, *rest):
        loaded.append(path.name)
        return load_pipeline(path, *rest)
    monkeypatch.setattr(fusion.judge, "grade_images", grade)
    monkeypatch.setattr(fusion.uvit_fusion, "load_pipeline", load)
    command = ["experiments.fusion", "compare", "--data", toy_data, "--clip", clip_folder, *TINY,
               "--size", 24, "--patch", 8, "--steps", 8, "--samples", 8, "--seeds", 1,
               "--device", "cpu", "--precision", "fp32", "--variants"]
    status, _, errors = run(*command, "early", cwd=tmp_path)
    assert status == 0, errors
    folder = tmp_path / "runs" / "compare"
    curve = common.read_json(folder / "early-0" / "graded.json")["curve"]
    assert [step for step, _ in curve] == [0, 4, 5, 6, 7, 8]
    assert loaded[:5] == [f"step{step}.safetensors" for step in (4, 5, 6, 7, 8)]
    scenes, _, _ = fusion.judge.validation_scenes(toy_data, 64)
    assert graded == [scenes[:8]] + 5 * [scenes[32:40]]        # the table's, and the curve's
    weights = folder / "early-0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    status, _, errors = run(*command, "early", "v2c0", cwd=tmp_path)
    assert status == 0, errors
    assert weights.stat().st_mtime_ns == before and len(graded) == 12
    assert (folder / "v2c0-0" / "graded.json").exists()
    assert (folder / "samples" / "variants.png").exists()
    refused(run(*command, "early", "--lr", 0.5, cwd=tmp_path), "was started with lr = 0.001")


def test_costs_are_of_equal_steps(clip_folder):
    base = Config(size=8, dim=32, depth=4, heads=2, batch_size=4)
    variants = {name: dataclasses.replace(base, image_blocks=v) for name, v in (
        ("early", 0), ("intermediate", 2))}
    costs = fusion.step_costs(variants, torch.device("cpu"), torch.float32, rounds=2)
    assert costs["intermediate"]["gflops"] < costs["early"]["gflops"]
    assert all(cost["ms"] > 0 and cost["sample_ms"] > 0 for cost in costs.values())
