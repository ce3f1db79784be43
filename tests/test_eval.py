"""Grading: a painter that draws what it is told gets 100 %, one that draws something else does not; costs and tables."""
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run

import common
import eval as grade
import uvit_fusion
from toy import shapes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shapes.build(tmp_path_factory.mktemp("data") / "shapes", train=30, val=64)


class Oracle:
    """Draws the validation scenes themselves, or those `shift` places further on."""
    settings = SimpleNamespace(size=24)

    def __init__(self, world, shift=0):
        self.scenes, self.shift = grade.validation_prompts(world, 24, 64)[0], shift

    def draw(self, prompts, **_):
        scenes = self.scenes[self.shift:] + self.scenes[:self.shift]
        return np.stack([shapes.render(shapes.layout(scene, random.Random(i)), 24) for i, scene in enumerate(scenes[:len(prompts)])])


def test_right_pictures_get_full_marks_and_wrong_ones_do_not(world):
    figures, table = grade.alignment(Oracle(world), world, 64)
    assert all(figures[name] == 100 for name in grade.ROWS) and figures["samples"] == 64 and figures["all_ci"] == 0
    assert 0 < np.isnan(table["relation"]).sum() < 64 and np.isnan(table["all_unseen"]).sum() == 32
    figures, _ = grade.alignment(Oracle(world, shift=7), world, 64)
    assert figures["all"] < 10 and figures["colour"] < 60


def test_the_same_captions_are_graded_each_time(world):
    assert grade.validation_prompts(world, 24, 20)[1] == grade.validation_prompts(world, 24, 64)[1][:20]


def test_interval_shrinks_with_the_number_of_samples():
    few, many = np.array([0., 1.] * 50), np.array([0., 1.] * 200)
    assert grade.interval(few) == pytest.approx(1.96 * 0.5 / 10)
    assert grade.interval(many) == pytest.approx(grade.interval(few) / 2)
    assert grade.interval(np.array([0., 1., np.nan] * 50)) == pytest.approx(grade.interval(few))


def test_intermediate_fusion_costs_less_than_early(monkeypatch):
    s = {name: uvit_fusion.Settings(size=16, dim=32, depth=4, heads=2, batch=4, **change | dict(image_blocks=v, caption_blocks=v))
         for name, v, change in (("early", 0, {}), ("intermediate", 1, {}))}
    costs = grade.step_costs(s, torch.device("cpu"), torch.float32, rounds=3)
    assert costs["intermediate"]["gflops"] < costs["early"]["gflops"]
    assert costs["intermediate"]["parameters"] > costs["early"]["parameters"]
    assert all(cost["ms"] > 0 and cost["sample_ms"] > 0 and 0 < cost["products"] < 1 for cost in costs.values())


def test_compare_and_analyse_run_from_end_to_end_and_pick_up_finished_runs(tmp_path, clip_folder, world, monkeypatch):
    flags = ["--clip", clip_folder, "--data", world, "--steps", 4, "--dim", 32, "--depth", 4, "--heads", 2, "--image-blocks", 1,
             "--caption-blocks", 1, "--batch", 4, "--seeds", 2, "--samples", 16, "--device", "cpu", "--precision", "fp32"]
    status, out, errors = run("uvit_fusion.py", "--compare", *flags, cwd=tmp_path)
    assert status == 0, errors
    results = json.loads((tmp_path / "runs" / "compare" / "results.json").read_text())
    for name in ("early_all", "intermediate_all", "early_cross_all", "intermediate_cross_all", "difference", "difference_ci", "early_all_ci"):
        assert isinstance(results[name], (int, float)), name
    assert {"commit", "machine", "command"} <= set(results)
    assert (tmp_path / "runs" / "compare" / "samples" / "variants.png").exists()
    monkeypatch.setattr(grade, "step_costs", lambda variants, *_: {name: {"gflops": 1.0, "ms": 1.0} for name in variants})     # measured above
    with monkeypatch.context() as patch:
        patch.setattr(uvit_fusion, "train", None)                                        # nothing is trained the second time
        assert run("uvit_fusion.py", "--compare", *flags, cwd=tmp_path)[0] == 0
        status, out, errors = run("uvit_fusion.py", "--compare", *flags, "--lr", "0.1", cwd=tmp_path)
        assert status == 2 and "lr" in errors
    status, _, errors = run("uvit_fusion.py", "--compare", *flags, "--lr", "0.1", "--seeds", 1, "--no-cross", "--overwrite", cwd=tmp_path)
    rates = {path.name: json.loads((path / "config.json").read_text())["lr"] for path in (tmp_path / "runs" / "compare").glob("early-*")}
    assert status == 0 and rates == {"early-0": 0.1, "early-1": uvit_fusion.Settings.lr}, errors
    status, out, errors = run("uvit_fusion.py", "--analyse", "--run", "runs/compare/early-0", cwd=tmp_path)
    assert status == 0 and "in 0" in out and (tmp_path / "runs" / "compare" / "early-0" / "attention_rank.png").exists(), errors


def test_frozen_features_do_not_depend_on_their_batch(clip_folder):
    encoder = common.TextEncoder(clip_folder)
    together, mask = encoder(["two red circles", "a very much longer caption of a blue square", ""])
    alone, own = encoder(["two red circles"])
    assert torch.allclose(together[0], alone[0], atol=1e-6) and torch.equal(mask[0], own[0])
