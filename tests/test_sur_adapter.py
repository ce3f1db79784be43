"""SUR-adapter: the adapter's equations, the distance and the losses, a training from end to end."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Painter, make_llm, refused, run, save_run, tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

import common
import encoders
import sur_adapter
import toy.narratives
import uvit_fusion
from common import UserError
from experiments import sur_adapter as experiment
from sur_adapter import Adapter, Config, feature_kl, fit_and_project, losses, pad_with_last_token
from toy import judge, language
from uvit_fusion import diffusion_loss

SMALL = dict(heads=2, feed_forward=24, steps=4, batch_size=4, images=2, texts=3, warmup=0)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
FLAGS += ["--device=cpu", "--precision=fp32"]


def new_adapter(adapter_class=Adapter, **changes):
    torch.manual_seed(0)
    return adapter_class(Config(**SMALL | changes), 32)


def randomized(adapter):
    """All parameters at random: what starts at zero hides what comes before it."""
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return adapter


def some_text(length=7, lengths=(7, 4, 2), seed=2):
    x = torch.randn(len(lengths), length, 32, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(length) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------ the adapter
def test_a_new_adapter_is_the_identity():
    x, mask = some_text()
    assert torch.equal(new_adapter()(x, mask)[0], x)


@pytest.mark.parametrize("residual", ["h", "x"])
def test_the_adapter_computes_its_equations(residual):
    adapter = randomized(new_adapter(eta=0.3, residual=residual))
    x, mask = some_text()
    y, h = adapter(x, mask)
    for i, n in enumerate(mask.sum(1)):
        x_i = x[i, :n]                                          # without padding no mask is needed
        h_i = x_i
        for block in adapter.encoder_blocks:
            h_i = h_i + block.attn(block.norm1(h_i)[None])[0]
            h_i = h_i + block.mlp(block.norm2(h_i))
        logits = (h_i @ adapter.query.weight.T) @ (x_i @ adapter.key.weight.T).T / math.sqrt(32)
        w = logits.softmax(-1) @ x_i + (h_i if residual == "h" else x_i)
        W_1, _, W_2 = adapter.mlp
        a = F.relu(w @ W_1.weight.T + W_1.bias) @ W_2.weight.T + W_2.bias + w
        expected = x_i + 0.3 * (a @ adapter.fc.weight.T + adapter.fc.bias)
        assert torch.allclose(h[i, :n], h_i, atol=1e-4)
        assert torch.allclose(y[i, :n], expected, atol=1e-4)


def test_a_prompt_depends_neither_on_the_others_of_its_batch_nor_on_its_padding():
    adapter = randomized(new_adapter())
    x, mask = some_text()
    other = x.clone()
    other[~mask] = 9.0
    other[2] = -x[2]
    for before, after in zip(adapter(x, mask), adapter(other, mask)):
        assert torch.allclose(before[:2][mask[:2]], after[:2][mask[:2]], atol=1e-4)


def test_the_toy_adapter_is_small_and_that_of_the_paper_has_14_million_parameters():
    deep = uvit_fusion.Config(**uvit_fusion.PRESETS["deep"])
    base = sum(p.numel() for p in uvit_fusion.UViT(deep).parameters())
    assert sum(p.numel() for p in Adapter(Config(), 128).parameters()) < 0.15 * base
    paper = Adapter(Config(**sur_adapter.PRESETS["paper"]), 768)
    assert 13e6 < sum(p.numel() for p in paper.parameters()) < 15e6


# ------------------------------------------------------------------------------------- the losses
def test_the_distance_is_the_kl_of_the_student_to_the_teacher():
    student = torch.tensor([[[0.5, 0.5]]]).log()
    teacher = torch.tensor([[[0.8, 0.2]]]).log()
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)            # 0.223, not 0.193
    assert feature_kl(teacher, student, torch.ones(1, 1), 1.0).item() == pytest.approx(expected)
    assert feature_kl(teacher, teacher, torch.ones(1, 1), 1.0).item() == pytest.approx(0)
    seen = torch.ones(1, 1, dtype=torch.bool)
    coarse = feature_kl(teacher.bfloat16(), student.bfloat16(), seen, 1.0)
    assert coarse.dtype == torch.float32, "for bf16 features, too"


def test_temperature_4_is_16_times_the_distance_of_a_quarter_of_the_features():
    teacher, mask = some_text()
    student, _ = some_text(seed=3)
    quarter = feature_kl(teacher / 4, student / 4, mask, 1.0)
    assert torch.allclose(feature_kl(teacher, student, mask, 4.0), 16 * quarter, rtol=1e-4)


def test_the_distance_is_summed_over_the_seen_tokens_and_averaged_over_the_batch():
    teacher, student = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(0))
    one = feature_kl(teacher, student, torch.ones(1, 1), 2.0)
    mask = torch.tensor([[True, False, False], [True, True, True]])             # 4 of 2 prompts
    assert torch.allclose(feature_kl(teacher, student.expand(2, 3, 5), mask, 2.0), 2 * one)


def test_the_padding_of_a_prompt_can_be_its_last_token_again():
    x, mask = some_text()
    padded = pad_with_last_token(x, mask)
    assert torch.equal(padded[mask], x[mask])
    assert (padded[2, 2:] == x[2, 1]).all() and (padded[1, 4:] == x[1, 3]).all()


@pytest.fixture
def batch():
    """What `losses` takes: three narratives, keyword prompts for two of them, two images."""
    x, mask = some_text(16, (9, 4, 2))
    target, target_mask = some_text(16, (3, 5), seed=4)
    torch.manual_seed(3)
    llm_target = 3 * torch.randn(3, 32)
    x_0, eps = torch.randn(2, 2, 3, 8, 8)
    return x, mask, target, target_mask, llm_target, x_0, torch.tensor([1, 700]), eps


@pytest.mark.parametrize("mask_text, student", [(True, "y"), (False, "y"), (True, "h")])
def test_each_term_is_its_equation(clip_folder, batch, mask_text, student):
    base = tiny_pipeline(clip_folder, mask_text=mask_text)
    adapter = randomized(new_adapter())
    cfg = Config(temperature=3.0, llm_student=student)
    noise, prompt, llm = losses(cfg, adapter, base, *batch)
    x, mask, target, target_mask, llm_target, x_0, t, eps = batch
    y, h = adapter(x, mask)
    expected = diffusion_loss(base.model, base.diffusion, x_0, t, eps, y[:2], mask[:2])
    assert torch.allclose(noise, expected, rtol=1e-4)
    seen = torch.ones_like(mask)
    if mask_text:                              # the network sees no padding, so it is not taught
        seen = mask
        target = pad_with_last_token(target, target_mask)
    assert torch.allclose(prompt, feature_kl(target, y[:2], seen[:2], 3.0), rtol=1e-4)
    taught = pad_with_last_token(y if student == "y" else h, seen).mean(1)
    expected = feature_kl(llm_target[:, None], taught[:, None], torch.ones(3, 1), 3.0)
    assert torch.allclose(llm, expected, rtol=1e-4)


@pytest.mark.parametrize("student", ["y", "h"])
def test_each_term_trains_the_adapter(pipeline, batch, student):
    """All of it; but the paper's LLM term, on h, the encoder alone."""
    adapter = randomized(new_adapter())
    names, parameters = zip(*adapter.named_parameters())
    noise, prompt, llm = losses(Config(llm_student=student), adapter, pipeline, *batch)
    for word, term in (("noise", noise), ("prompt", prompt), ("llm", llm)):
        assert term.requires_grad, f"the {word} term has no gradient"
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients):
            taught = name.startswith("encoder_blocks.") or term is not llm or student == "y"
            assert (gradient is not None and gradient.abs().max() > 0) == taught, (word, name)


# ------------------------------------------------------------------------------------------- P
def test_p_says_in_features_what_the_llm_makes_of_a_text_that_no_triple_has():
    """The LLM's states are a linear map of the meanings, so those of new texts are found again."""
    generator = torch.Generator().manual_seed(0)
    meanings = torch.randn(900, 6, generator=generator)
    states = meanings @ torch.randn(6, 20, generator=generator) + 5
    features = meanings @ torch.randn(6, 8, generator=generator) - 2
    rows = list(range(0, 900, 2))
    found = fit_and_project(Config(), states, rows, features[rows])
    assert torch.allclose(found, features, atol=0.3)
    random = fit_and_project(Config(llm_projection="random"), states, rows, features[rows])
    assert random.shape == features.shape and (random - features).std() > 1


def test_p_is_the_ridge_regression_on_features_of_deviation_one():
    states = torch.tensor([[0.0], [2.0], [4.0], [100.0]])
    found = fit_and_project(Config(), states, [0, 1, 2], torch.tensor([[1.0], [2.0], [3.0]]))
    z = (states - 2) / (2 + 1e-3)
    weight = 2 / (2 + 10)                     # z is -1, 0, 1; so are the targets less their mean
    assert torch.allclose(found, weight * z + 2, atol=1e-2)


# --------------------------------------------------------------------- the defects of the release
def test_the_released_adapter_attends_over_the_batch_and_is_not_the_identity():
    adapter = new_adapter(experiment.AsReleased, eta=0.1)
    x, mask = some_text()
    assert torch.allclose(adapter(x, mask)[0], 0.9 * x + 0.1 * adapter.fc.bias)
    h = randomized(adapter)(x, mask)[1]
    other_prompt, other_token = x.clone(), x.clone()
    other_prompt[2] = -x[2]
    other_token[0, 3] = -x[0, 3]
    assert not torch.allclose(h[0], adapter(other_prompt, mask)[1][0], atol=1e-2)
    assert torch.allclose(h[0, 0], adapter(other_token, mask)[1][0, 0], atol=1e-5)


# -------------------------------------------------------------------------------------- a training
@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder, llm_folder):
    """A folder with triples in surd/, a base, and a finished training of its adapter in run/."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "surd").mkdir()
    lines = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "surd" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a man on {i} horses",
                                 "prompt": f"man, horse, x{i}"}))
    (folder / "surd" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "surd" / "narratives.txt").write_text("a woman on a mule\nno one on a ladder\n")
    save_run(tiny_pipeline(clip_folder), folder / "base")
    status, _, errors = train(folder, llm_folder)
    assert status == 0, errors
    return folder


def train(folder, llm, *more, out="run"):
    return run("sur_adapter.py", "--train", "--base", "base", "--llm", llm, "--data", "surd",
               "--out", out, *FLAGS, *more, cwd=folder)


def test_narratives_are_read_as_captions_are(world, clip_folder, tmp_path):
    root = shutil.copytree(world / "surd", tmp_path / "surd")
    base = tiny_pipeline(clip_folder)
    (root / "narratives.txt").write_bytes("\ufeffa  woman\non a mule\n\n \n".encode())
    assert sur_adapter.load_triples(base, root)[1] == ["a woman", "on a mule"]
    (root / "narratives.txt").write_bytes(b"a woman\n\xff\n")
    with pytest.raises(UserError, match="narratives.txt, line 2: not in UTF-8"):
        sur_adapter.load_triples(base, root)
    lines = (root / "metadata.jsonl").read_text().replace('"man, horse, x3"', "3")
    (root / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match='expected metadata.jsonl .*"prompt": .keywords.'):
        sur_adapter.load_triples(base, root)


def test_a_training_leaves_the_adapter_alone_and_what_names_its_base_and_llm(world):
    config = json.loads((world / "run" / "config.json").read_text())
    assert len(config["base_identity"]) == len(config["llm_identity"]) == 64
    assert (config["base"], config["llm_layer"]) == ("base", -2)
    tensors = load_file(world / "run" / "model.safetensors")
    assert set(tensors) == set(new_adapter().state_dict())
    header = (world / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,noise,prompt,llm"
    assert (world / "run" / "samples" / "validation.png").stat().st_size > 0


def test_a_step_learns_from_the_weighted_terms_of_its_triples(
        world, llm_folder, tmp_path, monkeypatch):
    base = uvit_fusion.load_pipeline(world / "base", torch.device("cpu"), torch.float32)
    llm = encoders.LLMEncoder(llm_folder, -2)
    batches, gradients = [], []

    def three_numbers(cfg, adapter, pipeline, *batch):
        gradients.append(adapter.fc.bias.grad)                            # of the step before
        batches.append(batch)
        return adapter.fc.bias[:3]
    monkeypatch.setattr(sur_adapter, "losses", three_numbers)
    fitted = []

    def as_it_is(cfg, llm_features, rows, targets):
        fitted.append((llm_features[rows], targets))
        return F.pad(llm_features, (0, 16))                               # as wide as targets
    monkeypatch.setattr(sur_adapter, "fit_and_project", as_it_is)
    cfg = Config(**SMALL | dict(caption_dropout=0.5, grad_clip=0.0, noise_weight=2.0,
                                prompt_weight=3.0, llm_weight=5.0))
    dataset, texts = sur_adapter.load_triples(base, world / "surd")
    args = SimpleNamespace(resume=False, overwrite=False)
    sur_adapter.train(cfg, base, llm, dataset, texts, tmp_path / "run", args)
    assert gradients[1][:4].tolist() == [2.0, 3.0, 5.0, 0.0]
    assert not torch.allclose(batches[0][-1], batches[1][-1])             # new noise at every step

    triples = [("", "", None)]
    for i, (_, [(narrative, prompt)], _) in enumerate(dataset.items):
        triples.append((narrative, prompt, base.encode(dataset.image(i)[None])[0]))

    def llm_mean(text):
        return llm([text + ". in plain words:"])[0][0].mean(0)
    for llm_features, mean, (v, k, _) in zip(*fitted[0], triples[1:]):
        assert torch.allclose(llm_features, llm_mean(v), atol=1e-4)
        tokens, k_mask = base.text_encoder([k])
        assert torch.allclose(mean, pad_with_last_token(tokens, k_mask)[0].mean(0), atol=1e-4)
    seen = []
    others = []
    for x, mask, target, _, llm_features, x_0, t, eps in batches:
        assert x_0.shape == eps.shape == (2, 3, 8, 8) and t.shape == (2,)
        assert len(target) == 4 and len(x) == len(mask) == len(llm_features) == 7
        for i in range(4, 7):
            near = [(base.text_encoder([v])[0][0] - x[i]).abs().max().item() for v in texts]
            others.append(texts[np.argmin(near)])
            assert min(near) < 1e-4
            assert torch.allclose(llm_features[i, :16], llm_mean(others[-1]), atol=1e-4)
        for i in range(4):
            near = [(base.text_encoder([v])[0][0] - x[i]).abs().max().item() for v, _, _ in triples]
            v, k, image = triples[np.argmin(near)]
            assert torch.equal(mask[i], base.text_encoder([v])[1][0])
            assert torch.allclose(target[i], base.text_encoder([k])[0][0], atol=1e-4)
            if v:
                assert torch.allclose(llm_features[i, :16], llm_mean(v), atol=1e-4)
            else:                                            # it keeps its features
                expected = pad_with_last_token(x[i:i + 1], mask[i:i + 1])[0].mean(0)
                assert torch.allclose(llm_features[i], expected, atol=1e-4)
            assert i >= 2 or image is None or torch.equal(x_0[i], image)
            seen.append(v)
    assert 2 <= seen.count("") <= 14 and len(set(seen)) > 3
    assert set(others) == {"a woman on a mule", "no one on a ladder"}


def test_on_a_gpu_an_adapter_is_trained_and_attached(world, llm_folder, pretended_gpu):
    status, _, errors = train(world, llm_folder, "--llm-projection", "random", out="on_gpu")
    assert status == 0, errors
    status, _, errors = run("sample.py", "a man", "--run", "base", "--adapter", "on_gpu", cwd=world)
    assert status == 0, errors


def test_a_training_that_was_cut_equals_an_uninterrupted_one(world, llm_folder, monkeypatch):
    calls = []

    def stop_at_the_third(*batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*batch)
    monkeypatch.setattr(sur_adapter, "losses", stop_at_the_third)
    monkeypatch.setattr(common.Run, "due", lambda self, step: True)
    assert train(world, llm_folder, out="cut")[0] == 130
    assert train(world, llm_folder, "--resume", out="cut")[0] == 0 and len(calls) == 5
    whole, cut = (load_file(world / name / "model.safetensors") for name in ("run", "cut"))
    assert all(torch.allclose(whole[name], cut[name], atol=1e-6) for name in whole)


def test_an_adapter_stands_behind_the_text_encoder_of_its_own_base_only(
        world, clip_folder, monkeypatch):
    monkeypatch.chdir(world)
    base = uvit_fusion.load_pipeline("base", torch.device("cpu"), torch.float32)
    attached = sur_adapter.attach(base, world / "run")
    (x, mask), (y, same_mask) = base.text_encoder(["a man"]), attached.text_encoder(["a man"])
    assert torch.equal(y, attached.text_encoder.adapter(x, mask)[0]) and not torch.allclose(x, y)
    assert torch.equal(mask, same_mask)
    for other in (tiny_pipeline(clip_folder, seed=5), attached):
        with pytest.raises(common.UserError, match="was trained for base as it was then"):
            sur_adapter.attach(other, world / "run")
    loaded = sur_adapter.load_pipeline("run", base.device, base.precision)
    assert np.array_equal(loaded.generate(["a man"], 2), attached.generate(["a man"], 2))


def test_slips_end_in_one_line(world, llm_folder, coco):
    refused(train(world, llm_folder), "run/ already holds a run")
    refused(train(world, llm_folder, "--heads", 5, out="new"), "--heads 5", "32")
    refused(train(world, llm_folder, "--base", "nowhere", out="new"), "nowhere")
    refused(train(world, llm_folder, "--data", coco, out="new"), f"--data {coco}", '"prompt"')


# --------------------------------------------------------------------------- grading and comparing
def test_a_grade_tells_narratives_from_plain_captions(
        toy_data, clip_folder, tmp_path, monkeypatch):
    scenes, captions, _ = judge.validation_scenes(toy_data, 20)
    narratives = language.narrative_prompts(scenes)
    unheard = language.narrative_prompts(scenes, "unheard")
    # the LLM says 15 narratives and 5 of those with unheard words as their captions do
    said = dict(zip(narratives[:15] + unheard[:5], captions[:15] + captions[:5]))
    monkeypatch.setattr(toy.narratives, "Rewriter", lambda llm, device: (
        lambda prompts: [said.get(prompt, "") for prompt in prompts]))
    base = Painter(captions, toy_data, clip_folder)
    base.model = torch.nn.Linear(4, 10)
    adapted = Painter(captions[:10] + narratives + unheard[:4], toy_data, clip_folder)
    adapted.text_encoder = SimpleNamespace(adapter=torch.nn.Linear(1, 5))
    figures = toy.narratives.report(
        base, adapted, "llm", toy_data, tmp_path, samples=20, steps=2)
    assert figures["base_plain"] == figures["narrative"] == figures["colour"] == 100
    assert figures["base_narrative"] == figures["base_shape"] == figures["base_unheard"] == 0
    assert figures["unheard"] == pytest.approx(20)
    assert figures["rewriting"] == pytest.approx(75)
    assert figures["rewriting_unheard"] == pytest.approx(25)
    assert figures["plain"] == figures["plain_loss"] == pytest.approx(50)
    assert figures["narrative_share"] == 100 and figures["adapter_share"] == 20
    assert figures["distance_base"] < 1e-6 < figures["distance"]
    assert (tmp_path / "samples" / "narratives.png").stat().st_size > 0


def test_the_rival_continues_each_prompt_greedily_behind_the_question(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from toy.models import train_tokenizer
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a man on a horse"], 300, 64, "<|start|> $A")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        initializer_range=0.5)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = ["a man on a horse on a horse", "a man"]
    for prompt, said in zip(prompts, toy.narratives.Rewriter(tmp_path)(prompts)):
        ids = tokenizer(prompt + ". in plain words:").input_ids
        start = len(ids)
        while len(ids) < start + 24 and ids[-1] != 3:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert said == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_a_comparison_keeps_what_is_finished(toy_data, base, llm_folder, tmp_path, monkeypatch):
    shutil.copytree(toy_data, tmp_path / "shapes")
    language.build_narratives(tmp_path / "shapes", texts=10)
    monkeypatch.setattr(toy, "prepare", lambda *flags: tmp_path / "shapes")
    monkeypatch.setattr(toy.narratives, "Rewriter", lambda llm, device: list)
    monkeypatch.setattr(experiment, "ABLATIONS", experiment.ABLATIONS | {"others": {}})

    def unheard(*more):
        return run("experiments.sur_adapter", "unheard", "--base", base, "--llm", llm_folder,
                   "--out", "out", "--samples", 4, "--sample-steps", 2, *FLAGS, *more, cwd=tmp_path)
    status, table, errors = unheard()
    assert status == 0, errors
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("base", "rewriting", "as_intended", "no_llm"):
        assert name in table and {f"{name}_unheard", f"{name}_unheard_ci"} <= set(figures)
    for name in ("narrative", "unheard", "unheard_without_llm", "rewriting"):
        assert {name, f"{name}_ci"} <= set(figures)
    config = json.loads((tmp_path / "out" / "no_llm" / "config.json").read_text())
    assert config["llm_weight"] == 0 and not (tmp_path / "out" / "others").exists()
    monkeypatch.setattr(sur_adapter, "losses", None)                     # nothing is trained again
    assert unheard()[1].splitlines()[-4:] == table.splitlines()[-4:]
    refused(unheard("--seed", 1), "as_intended/ was started with seed = 0, now it is 1")
