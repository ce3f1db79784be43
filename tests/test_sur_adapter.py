"""Narratives understood: the adapter's equations, what trains it, what the defects of the release do, and a training from end to end."""
import copy
import dataclasses
import json
import math
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from PIL import Image
from safetensors.torch import load_file
from test_llm_adapter import randomized, save_llm
from test_training import TINY, refused

import common
import llm_adapter
import sample
import sur_adapter
import uvit_fusion
from common import CaptionedImages, LLMEncoder, UserError
from sur_adapter import Adapter, Settings, behind_the_end, divergence, losses, think, triples
from toy import shapes, tellings

SMALL = dict(heads=2, feed_forward=24, steps=4, batch=4, pictures=4, warmup=0, drop=0.3)
FLAGS = ["--heads", 2, "--feed-forward", 24, "--batch", 4, "--pictures", 4, "--device", "cpu", "--precision", "fp32"]


def new_adapter(dim=16, llm_dim=10, **change):
    torch.manual_seed(0)
    return Adapter(Settings(**SMALL | change), dim, llm_dim)


def some_text(batch=3, length=7, dim=16, lengths=(7, 4, 2)):
    x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(length) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------------------------ the adapter
def test_the_adapter_begins_as_the_identity():
    x, mask = some_text()
    assert torch.equal(new_adapter()(x, mask)[0], x)


def test_the_released_adapter_does_not_begin_as_the_identity():
    adapter, (x, mask) = new_adapter(as_released=True, eta=0.1), some_text()
    assert torch.allclose(adapter(x, mask)[0], 0.9 * x + 0.1 * adapter.fc.bias)


@pytest.mark.parametrize("residual", ["h", "x"])
def test_the_adapter_computes_its_equations(residual):
    adapter, (x, mask) = randomized(new_adapter(eta=0.3, residual=residual)), some_text()
    y, h = adapter(x, mask)
    for i, n in enumerate(mask.sum(1)):
        one = states = x[i, :n]                                                                 # without padding, no mask is needed
        for block in adapter.encoder_blocks:
            states = block(states[None])[0]
        attention = (states @ adapter.query.weight.T @ (one @ adapter.key.weight.T).T / math.sqrt(16)).softmax(-1)
        w = attention @ one + (states if residual == "h" else one)
        a = F.relu(w @ adapter.mlp[0].weight.T + adapter.mlp[0].bias) @ adapter.mlp[2].weight.T + adapter.mlp[2].bias + w
        assert torch.allclose(y[i, :n], one + 0.3 * (a @ adapter.fc.weight.T + adapter.fc.bias), atol=1e-4)
        assert torch.allclose(h[i, :n], states, atol=1e-4)


def test_a_prompt_depends_neither_on_the_others_of_its_batch_nor_on_its_padding():
    adapter, (x, mask) = randomized(new_adapter()), some_text()
    other = x.clone()
    other[~mask] = 9.0
    other[2] = -x[2]
    for before, after in zip(adapter(x, mask), adapter(other, mask)):
        assert torch.allclose(before[:2][mask[:2]], after[:2][mask[:2]], atol=1e-5)


def test_the_released_adapter_attends_over_the_batch_instead_of_the_tokens():
    adapter, (x, mask) = randomized(new_adapter(as_released=True)), some_text()
    states = adapter(x, mask)[1]
    other, moved = x.clone(), x.clone()
    other[2], moved[0, 3] = -x[2], -x[0, 3]
    assert not torch.allclose(states[0], adapter(other, mask)[1][0], atol=1e-2)                 # another prompt changes this one
    assert torch.allclose(states[0, 0], adapter(moved, mask)[1][0, 0], atol=1e-5)               # another token of this one does not


def test_heads_that_do_not_divide_the_text_features_are_refused():
    with pytest.raises(UserError, match="--heads 3 cannot share text features of 16"):
        new_adapter(heads=3)


def test_the_toy_adapter_is_small():
    base = uvit_fusion.UViT(uvit_fusion.Settings())
    adapter = Adapter(Settings(), 128, 128)
    assert sum(p.numel() for p in adapter.parameters()) < 0.15 * sum(p.numel() for p in base.parameters())


def test_the_paper_preset_has_the_size_and_the_values_of_the_release():
    s = Settings(**sur_adapter.PRESETS["paper"])
    adapter = Adapter(dataclasses.replace(s, as_released=True), 768, 5120)
    assert 13e6 < sum(p.numel() for name, p in adapter.named_parameters() if "project" not in name) < 15e6
    assert (s.eta, s.prompt_weight, s.llm_weight, s.lr, s.steps, s.llm_layer) == (0.1, 1e-5, 1e-5, 1e-5, 5000, -2)


# --------------------------------------------------------------------------------------------------------------- the loss
def test_the_divergence_is_that_of_the_release():
    teacher, student = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.randn(2, 3, 5)
    seen = torch.tensor([[True, True, False], [True, False, False]])
    expected = sum(F.kl_div(teacher[i, j].log_softmax(-1), student[i, j].softmax(-1), reduction="sum") for i, j in seen.nonzero().tolist()) / 2
    assert torch.allclose(divergence(teacher, student, seen), expected, atol=1e-6)
    assert divergence(student, student, seen).abs() < 1e-6


def test_behind_its_end_a_prompt_is_its_last_token_again():
    x, mask = some_text(lengths=(7, 4, 2))
    filled = behind_the_end(x, mask)
    assert torch.equal(filled[0], x[0]) and torch.equal(filled[2, :2], x[2, :2])
    assert (filled[2, 2:] == x[2, 1]).all() and (filled[1, 4:] == x[1, 3]).all()


NARRATIVES = ["a trio of balls the colour of grass", "a lone brick", "", "twin tents"]
PROMPTS = ["three", "square, red", "", "triangle, x2, and much more than the narrative says"]


@pytest.fixture(scope="session")
def world(tmp_path_factory, clip_folder):
    """A folder with pictures and metadata.jsonl, a base of a few steps, an LLM; and a finished run of the adapter, run/."""
    folder = tmp_path_factory.mktemp("narratives")
    rng = np.random.default_rng(0)
    (folder / "surd").mkdir()
    with open(folder / "surd" / "metadata.jsonl", "w") as file:
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / "surd" / f"{i}.jpg")
            file.write(json.dumps({"file_name": f"{i}.jpg", "text": f"a man on {i} horses", "prompt": f"man, horse, x{i}"}) + "\n")
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "surd", "--clip", clip_folder, "--steps", 3, "--out", "base", *TINY, cwd=folder)
    assert status == 0, errors
    save_llm(folder / "llm", "LlamaForCausalLM")
    status, _, errors = train(folder)
    assert status == 0, errors
    return folder


def train(folder, *more, out="run", steps=4, data="surd"):
    return run("sur_adapter.py", "--train", "--base", "base", "--llm", "llm", "--data", data, "--out", out, "--steps", steps, *FLAGS, *more,
               cwd=folder)


@pytest.fixture
def bench(world):
    """What `losses` is given."""
    base, llm = sample.load_run(world / "base", "cpu", "fp32"), LLMEncoder(str(world / "llm"))
    s = base.settings
    x_0, eps = torch.randn(2, 4, s.channels, s.size, s.size, generator=torch.Generator().manual_seed(0))
    t, texts = torch.tensor([1, 300, 700, 1000]), (base.encoder(NARRATIVES), base.encoder(PROMPTS), think(llm, NARRATIVES))
    return SimpleNamespace(base=base, llm=llm, batch=(*texts, x_0, t, eps))


def gradients(bench, **change):
    """{parameter: gradient} of a new adapter under the sum of the weighted terms."""
    s = Settings(**SMALL | change)
    adapter = new_adapter(bench.base.encoder.dim, bench.llm.dim, **change)
    adapter = randomized(adapter).requires_grad_(True)                         # what begins at zero lets nothing through to what is before
    terms = losses(s, adapter, bench.base, *bench.batch)
    loss = sum(getattr(s, f"{name}_weight") * term for name, term in terms.items())
    if loss.requires_grad:
        loss.backward()
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in adapter.named_parameters()}


ALONE = {"noise": dict(prompt_weight=0.0, llm_weight=0.0), "prompt": dict(noise_weight=0.0, llm_weight=0.0),
         "llm": dict(noise_weight=0.0, prompt_weight=0.0)}


def test_the_noise_loss_reaches_the_whole_adapter(bench):
    moved = gradients(bench, **ALONE["noise"])
    assert all(value > 0 for name, value in moved.items() if not name.startswith("project."))


def test_as_released_the_noise_loss_reaches_nothing(bench):
    assert not any(gradients(bench, as_released=True, **ALONE["noise"]).values())
    assert any(gradients(bench, as_released=True, **ALONE["prompt"]).values())


@pytest.mark.parametrize("term", ALONE)
def test_no_term_reaches_the_base(bench, term):
    gradients(bench, **ALONE[term])
    assert all(p.grad is None for p in [*bench.base.model.parameters(), *bench.base.encoder.model.parameters()])


def test_the_llm_term_reaches_the_encoder_and_not_the_output(bench):
    moved = gradients(bench, **ALONE["llm"])
    assert moved["project.weight"] > 0 and moved["encoder_blocks.0.mlp.0.weight"] > 0 and moved["fc.weight"] == 0


def test_a_term_of_weight_zero_is_not_computed(bench):
    for name, change in ALONE.items():
        assert list(losses(Settings(**SMALL | change), new_adapter(bench.base.encoder.dim, bench.llm.dim), bench.base, *bench.batch)) == [name]


def test_a_map_of_the_teacher_can_make_it_say_nothing(bench):
    """With P = 0 on the LLM's side the term is the same whatever the LLM thinks: training P can shrink it so. On the adapter's side it cannot."""
    *first, thoughts, x_0, t, eps = bench.batch
    for projection, nothing in (("teacher", True), ("student", False)):
        adapter = new_adapter(bench.base.encoder.dim, bench.llm.dim, projection=projection)
        for p in adapter.project.parameters():
            torch.nn.init.zeros_(p)
        values = [losses(Settings(**SMALL | ALONE["llm"], projection=projection), adapter, bench.base, *first, some, x_0, t, eps)["llm"]
                  for some in (thoughts, 5 * thoughts.flip(0))]
        assert torch.allclose(*values) == nothing


def test_the_prompt_term_vanishes_where_the_narrative_is_the_prompt(bench):
    adapter = new_adapter(bench.base.encoder.dim, bench.llm.dim)
    narratives, _, *rest = bench.batch
    assert losses(Settings(**SMALL), adapter, bench.base, narratives, narratives, *rest)["prompt"].abs() < 1e-5
    assert losses(Settings(**SMALL), adapter, bench.base, *bench.batch)["prompt"] > 1e-2


def test_only_tokens_that_the_network_sees_are_aligned(bench):
    """A base that hides padding is aligned up to the narrative's end, one that sees it (as published) on all tokens."""
    adapter, shown = new_adapter(bench.base.encoder.dim, bench.llm.dim), copy.copy(bench.base)
    shown.settings = dataclasses.replace(shown.settings, mask_text=False)
    (x, mask), (target, _) = bench.base.encoder(NARRATIVES), bench.base.encoder(PROMPTS)
    s = Settings(**SMALL | ALONE["prompt"])
    assert torch.allclose(losses(s, adapter, shown, *bench.batch)["prompt"], divergence(target, x, torch.ones_like(mask), s.temperature), rtol=1e-4)
    hidden = divergence(behind_the_end(target, bench.base.encoder(PROMPTS)[1]), x, mask, s.temperature)
    assert torch.allclose(losses(s, adapter, bench.base, *bench.batch)["prompt"], hidden, rtol=1e-4)


def test_the_llm_thinks_the_mean_of_its_tokens(bench):
    alone = [bench.llm([text])[0][0].mean(0) for text in NARRATIVES]
    assert torch.allclose(think(bench.llm, NARRATIVES), torch.stack(alone), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------- data
def turned(scene):
    return shapes.Scene(scene.groups[::-1], shapes.OPPOSITE[scene.relation]) if scene.relation else scene


def test_texts_are_encoded_once_and_come_back_as_they_were(bench):
    calls = []

    def encoder(texts):
        calls.append(texts)
        return bench.base.encoder(texts)
    for most, expected in ((1e9, [["a", "b"], ["c"]]), (0, [["a", "b"], ["b", "c"]])):
        calls.clear()
        keeping = sur_adapter.Remembered(encoder, most)
        keeping(["a", "b", "a"])
        for got, want in zip(keeping(["b", "c"]), bench.base.encoder(["b", "c"])):
            assert torch.allclose(got.float(), want.float(), atol=1e-5)
        assert calls == expected


def test_the_toy_triples_are_in_the_published_format_and_hold_pairs_of_facts_out(tmp_path):
    shapes.build(tmp_path / "shapes", 16, train=300, val=60)
    tellings.build_narratives(tmp_path / "shapes")
    words = re.compile("|".join(sorted(tellings.HUES, key=len, reverse=True)))
    for split in ("train", "val"):
        folder = tmp_path / "shapes" / f"{split}2017"
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        scenes = [shapes.Scene.from_json(image["scene"]) for _, _, image in CaptionedImages(tmp_path / "shapes", split, 16).items]
        assert all((folder / line["file_name"]).exists() for line in lines) and len(lines) == len(scenes)
        narrated = [(line, scene) for line, scene in zip(lines, scenes) if line["text"] != line["prompt"]]
        assert (split == "val") == (len(narrated) == len(lines)) and len(narrated) > 0.6 * len(lines)
        assert all(line["prompt"] in (shapes.keywords(scene), shapes.keywords(turned(scene))) for line, scene in narrated)
        assert all(not re.search(rf"\b{colour}\b", line["text"]) for line, _ in narrated for colour in shapes.COLOURS)
    assert words.search(narrated[0][0]["text"])
    again = (folder / "metadata.jsonl").stat().st_mtime_ns
    tellings.build_narratives(tmp_path / "shapes")
    assert (folder / "metadata.jsonl").stat().st_mtime_ns == again


def test_metadata_is_split_and_read_as_captioned_pictures(world):
    train_split, val = (CaptionedImages(world / "surd", split, 16) for split in ("train", "val"))
    assert (len(train_split), len(val)) == (11, 1) and val.items[0][1] == ["a man on 0 horses"]
    pairs = triples(sample.load_run(world / "base", "cpu", "fp32"), world / "surd", "train").items
    assert pairs[0][1] == [("a man on 1 horses", "man, horse, x1")]


@pytest.mark.parametrize("line, words", [
    ("{", ["metadata.jsonl, line 2", "expected"]), ('{"file_name": "0.jpg"}', ["line 2", '"text"']), ('{"file_name": 3, "text": "a"}', ["line 2"]),
    ('{"file_name": "0.jpg", "text": "a man"}', ["metadata.jsonl", '"prompt"']), ('["0.jpg", "a"]', ["line 2"])])
def test_broken_metadata_is_refused_in_one_line(world, tmp_path, line, words):
    shutil.copytree(world / "surd", tmp_path / "surd")
    good = '{"file_name": "0.jpg", "text": "a", "prompt": "b"}'
    (tmp_path / "surd" / "metadata.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    refused(train(world, data=tmp_path / "surd", out="new"), *words)
    assert not (world / "new").exists()


# ------------------------------------------------------------------------------------------------------------- a training
def test_a_training_leaves_only_the_adapter_and_says_what_it_stands_on(world):
    tensors, config = load_file(world / "run" / "model.safetensors"), json.loads((world / "run" / "config.json").read_text())
    dim, llm_dim = config["llm_dim"], 32
    assert set(tensors) == set(Adapter(Settings(**SMALL), 32, dim).state_dict()) and dim == llm_dim
    assert config["base"] == "base" and config["llm"] == "llm" and config["llm_layer"] == -2 and config["eta"] == Settings().eta
    assert len(config["base_identity"]) == len(config["llm_identity"]) == 64
    for name in ("state.pt", "metrics.csv", "loss.png", "samples/validation.png"):
        assert (world / "run" / name).stat().st_size > 0, name
    assert (world / "run" / "metrics.csv").read_text().splitlines()[0] == "step,lr,noise,prompt,llm"


class Stop(Exception):
    """What ends a training in the middle."""


def test_a_resumed_training_equals_an_uninterrupted_one(world, tmp_path, monkeypatch):
    s, calls = common.read_settings(Settings, world / "run"), []
    base, llm = sample.load_run(world / "base", "cpu", "fp32"), LLMEncoder(str(world / "llm"), s.llm_layer)

    def stopping(*values):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return losses(*values)
    dataset = triples(base, world / "surd", "train")
    monkeypatch.setattr(sur_adapter, "losses", stopping)
    with pytest.raises(Stop):
        sur_adapter.train(s, base, llm, dataset, tmp_path / "cut", common.Options(save_every=1))
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 2
    status, _, errors = train(world, "--resume", out=tmp_path / "cut")
    assert status == 0 and len(calls) == 5, errors
    assert (world / "run" / "model.safetensors").read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()


def test_parts_of_a_batch_add_up_to_it(world, tmp_path):
    status, _, errors = train(world, "--accumulate", 2, out=tmp_path / "parts")
    assert status == 0, errors
    a, b = (load_file(folder / "model.safetensors") for folder in (world / "run", tmp_path / "parts"))
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    refused(train(world, "--accumulate", 3, out=tmp_path / "new"), "--batch 4", "multiples of --accumulate")
    refused(train(world, "--pictures", 5, out=tmp_path / "new"), "--pictures 5")


@pytest.mark.parametrize("flags", [["--as-released"], ["--projection", "teacher"], ["--projection", "frozen"],
                                   ["--llm-weight", 0, "--noise-weight", 0]])
def test_every_kind_of_training_runs(world, tmp_path, flags):
    status, _, errors = train(world, *flags, out=tmp_path / "run")
    assert status == 0, errors
    status, _, errors = run("sample.py", "a man", "--run", tmp_path / "run", "--sample-steps", 2, "--device", "cpu", cwd=world)
    assert status == 0, errors


def test_a_frozen_projection_stays_and_a_trained_one_moves(world, tmp_path):
    for projection, moves in (("frozen", False), ("teacher", True)):
        assert train(world, "--projection", projection, out=tmp_path / projection)[0] == 0
        torch.manual_seed(0)
        first = Adapter(Settings(**SMALL, projection=projection), 32, 32).project.weight
        assert torch.equal(load_file(tmp_path / projection / "model.safetensors")["project.weight"], first) != moves


def test_the_adapter_draws_as_a_run_and_behind_its_base(world, tmp_path):
    for i, flags in enumerate((["--run", "run"], ["--run", "base", "--adapter", "run"])):
        status, _, errors = run("sample.py", "a man", "--out", tmp_path / f"{i}.png", "--sample-steps", 2, "--device", "cpu", *flags, cwd=world)
        assert status == 0, errors
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    base = sample.load_run(world / "base", "cpu", "fp32")
    painter = sur_adapter.attach(base, world / "run")
    (x, mask), (y, same) = base.encoder(NARRATIVES), painter.encoder(NARRATIVES)
    assert torch.equal(mask, same) and torch.equal(y, painter.encoder.adapter(x, mask)[0]) and not torch.allclose(x, y)


def test_another_base_is_refused(world, clip_folder, tmp_path):
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "surd", "--clip", clip_folder, "--steps", 4, "--seed", 1,
                            "--out", tmp_path / "other", *TINY, cwd=world)
    assert status == 0, errors
    refused(run("sample.py", "a man", "--run", tmp_path / "other", "--adapter", "run", cwd=world), "run/ was made for base", "--run")
    refused(run("sample.py", "a man", "--run", "run", "--adapter", "run", cwd=world), "run/ is a run of an adapter", "uvit_fusion.py")
    refused(run("sample.py", "a man", "--run", "base", "--adapter", "base", cwd=world), "base/config.json is no configuration")
    refused(run("sample.py", "a man", "--run", "base", "--adapter", "nowhere", cwd=world), "nowhere/config.json is missing")


def test_a_damaged_adapter_is_refused(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"nothing")
    refused(run("sample.py", "a man", "--run", "base", "--adapter", tmp_path / "run", cwd=world), "is damaged")


@pytest.mark.parametrize("flags, words", [
    (["--llm", "coco"], ["--llm coco"]), (["--base", "nowhere"], ["nowhere"]), (["--eta", 0], ["--eta", "more than 0"]),
    (["--projection", "none"], ["--projection none", "student"]), (["--heads", 5], ["--heads 5"]), (["--llm-layer", 9], ["--llm-layer 9"]),
    (["--preset", "huge"], ["--preset huge"]), (["--resume"], ["--resume", "state.pt"])])
def test_slips_end_in_one_line(world, flags, words):
    refused(train(world, *flags, out="new"), *words)


def test_a_finished_run_is_not_overwritten_by_mistake(world):
    refused(train(world), "run/ holds a run already")


def test_another_llm_in_the_same_place_is_refused_on_resuming(world, tmp_path):
    for name in ("llm", "run", "surd", "base"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.rmtree(tmp_path / "llm")
    save_llm(tmp_path / "llm", "LlamaForCausalLM", seed=5)
    refused(train(tmp_path, "--resume"), "run/ was begun from llm as it was then", "--overwrite")


# ----------------------------------------------------------------------------------------------------------- a comparison
@pytest.mark.parametrize("method, ablations, flags", [
    (sur_adapter, {"as_intended": {}, "no_prompt": {"prompt_weight": 0.0}}, [*FLAGS, "--steps", 3]),
    (llm_adapter, {"adapter": ({}, (1,)), "no_mask": ({"mask": False}, (1,))},
     ["--width", 16, "--heads", 2, "--encoder-blocks", 1, "--decoder-blocks", 1, "--batch", 4, 4, 4, "--steps", 3, 1, 1, *FLAGS[-4:]])])
def test_a_comparison_keeps_what_is_finished_and_goes_on_with_the_rest(tmp_path, clip_folder, monkeypatch, method, ablations, flags):
    shapes.build_quality(shapes.build(tmp_path / "data" / "shapes", 24, train=30, val=12), 24, count=4)
    save_llm(tmp_path / "llm", "LlamaForCausalLM")
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "data/shapes", "--clip", clip_folder, "--steps", 2, "--out", "base", *TINY,
                            "--size", 24, cwd=tmp_path)
    assert status == 0, errors
    steps, follow = [], common.follow

    def interrupted(*values):                                                 # by a Ctrl-C, in the second step of the second run
        follow(*values)
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(common, "follow", interrupted)
    monkeypatch.setattr(method, "ABLATIONS", ablations)

    def compare(*more):
        return run(f"{method.__name__}.py", "--compare", "--base", "base", "--llm", "llm", "--out", "compared", "--samples", 4, "--sample-steps", 2,
                   *flags, *more, cwd=tmp_path)

    def read(name, file):
        return json.loads((tmp_path / "compared" / name / file).read_text())
    assert compare()[0] == 130 and len(steps) == 5
    status, table, errors = compare()
    assert status == 0 and len(steps) == 6, errors
    figures = read("", "results.json")
    assert all(name in table and {name, f"{name}_ci"} <= set(figures) for name in ablations)
    assert compare()[:2] == (0, table) and len(steps) == 6 and read("", "results.json") == figures
    refused(compare("--seed", 1), "was made with seed = 0, now it is 1")
    status, _, errors = compare("--seed", 1, "--overwrite")
    assert status == 0 and len(steps) == 12 and all(read(name, "config.json")["seed"] == 1 for name in ablations), errors
