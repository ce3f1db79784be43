"""An LLM as the text encoder: the adapter's equations, the losses, the stages, the grading."""
import dataclasses
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import Painter, make_coco, make_llm, refused, run, save_run, tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

import common
import encoders
import image_data
import llm_adapter
import toy
import uvit_fusion
from experiments import llm_adapter as experiment
from llm_adapter import AdaptedEncoder, Adapter, Config, alignment_loss, cos_len
from toy import judge, language, models, multilingual, shapes
from toy.shapes import Group, Scene

SMALL = dict(width=16, heads=2, steps_1=3, steps_2=2, steps_3=2, batch_size=8, warmup=0)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
FLAGS += ["--device=cpu", "--precision=fp32"]
STAGES = ("stage1", "stage2", "stage3")


def new_adapter(adapter_class=Adapter, **changes):
    """10 features of the LLM -> 6 tokens x 12 features; no parameter is zero, so nothing hides."""
    torch.manual_seed(0)
    adapter = adapter_class(Config(**SMALL | changes), 10, 6, 12)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    adapter.mean.copy_(torch.randn(12))
    adapter.std.copy_(torch.rand(12))
    return adapter.requires_grad_(False)


def some_states(lengths=(9, 5, 2), seed=2):
    """States of an LLM for three texts, (3, 9, 10), and their mask."""
    h = torch.randn(len(lengths), max(lengths), 10, generator=torch.Generator().manual_seed(seed))
    return h, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------ the adapter
def test_the_adapter_computes_its_equations():
    adapter = new_adapter()
    h, mask = some_states()
    y, p = adapter(h, mask)
    for i, n in enumerate(mask.sum(1).tolist()):              # without padding no mask is needed
        m = adapter.mlp(adapter.norm_in(h[i:i + 1, :n]))
        m = m + F.conv1d(m.mT, adapter.conv.weight, adapter.conv.bias, padding=2).mT
        angles = torch.arange(n)[:, None] * 10_000**(-torch.arange(8) / 8)
        m = m + torch.cat([angles.cos(), angles.sin()], dim=1)
        for block in adapter.encoder_blocks:
            m = block(m)
        r = adapter.queries
        for block in adapter.decoder_blocks:
            r = block(r, context=m)
        r = adapter.norm(r)
        assert torch.allclose(y[i], adapter.mean + adapter.std * adapter.out(r[0]), atol=1e-4)
        assert torch.allclose(p[i], adapter.presence(r[0])[:, 0], atol=1e-4)


def test_the_order_of_a_texts_tokens_matters_and_its_padding_does_not():
    h, mask = some_states()
    by_position = new_adapter(conv_kernel=1)
    turned = by_position(h.flip(1), mask)[0]
    assert not torch.allclose(by_position(h, mask)[0][0], turned[0], atol=0.1)
    longer = F.pad(torch.where(mask[..., None], h, 9.0), (0, 0, 0, 3), value=7.0)
    for found, expected in zip(new_adapter()(longer, F.pad(mask, (0, 3))), new_adapter()(h, mask)):
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_new_adapter_starts_on_the_scale_of_the_text_encoder_without_its_convolution(pipeline):
    def text_encoder(captions):
        mask = torch.arange(16).expand(len(captions), -1) < 5
        features = 30 + 2 * torch.randn(len(captions), 16, 32)
        return torch.where(mask[..., None], features, 999.0), mask
    pipeline.text_encoder = text_encoder
    llm = SimpleNamespace(dim=10, device=pipeline.device)
    model = llm_adapter.new_model(Config(**SMALL), pipeline, llm, ["a", "b"], Adapter)
    adapter = model["adapter"]
    assert torch.allclose(adapter.mean, torch.full((32,), 30.0), atol=0.5)
    assert torch.allclose(adapter.std, torch.full((32,), 2.0), atol=0.3)
    assert not adapter.conv.weight.any() and not adapter.conv.bias.any()
    uvits = zip(model["uvit"].parameters(), pipeline.model.parameters())
    assert all(torch.equal(mine, base) for mine, base in uvits)
    pipeline.cfg.mask_text = False                            # the U-ViT sees padding, too
    model = llm_adapter.new_model(Config(**SMALL), pipeline, llm, ["a", "b"], Adapter)
    assert (model["adapter"].mean > 500).all()


def test_all_tokens_behind_the_first_padding_are_padding():
    p = torch.tensor([[1.0, 2, -1, 3], [-1, 1, 1, 1], [1, 1, 1, 1]])

    def llm(texts):
        return torch.zeros(3, 5, 10), None
    encoder = AdaptedEncoder(llm, lambda h, mask: (h + 1, p), torch.float32)
    y, mask = encoder(["a", "b", "c"])
    assert (y == 1).all()
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]


# -------------------------------------------------------------------------------------- the losses
def test_cos_len_is_one_minus_the_cosine_plus_the_squared_difference_of_lengths():
    target = torch.tensor([[3.0, 4.0], [0.0, 2.0]])                      # lengths 5 and 2
    assert cos_len(target, target, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert cos_len(2 * target, target, 0.1).item() == pytest.approx(0.1 * (25 + 4) / 2)
    turned = torch.tensor([[4.0, -3.0], [2.0, 0.0]])                     # by 90 degrees
    assert cos_len(turned, target, 0.1).item() == pytest.approx(1)
    assert cos_len(-target, target, 0.1).item() == pytest.approx(2)
    half = torch.tensor([[3.0, 4.0], [2.0, 0.0]])
    assert cos_len(half, target, 0.1).item() == pytest.approx(0.5)


def align(cfg, y, p, c, c_mask, mask_text=True):
    """L_1 of an adapter that gives y and p."""
    return alignment_loss(cfg, lambda h, mask: (y, p), None, None, c, c_mask, mask_text)


def test_the_alignment_loss_is_over_what_the_u_vit_sees():
    c = torch.tensor([[[1.0, 0], [0, 1], [1, 0]], [[0, 1], [1, 0], [0, 1]]])
    c_mask = torch.tensor([[True, True, False], [True, False, False]])
    y = c.clone()
    y[0, 1] = torch.tensor([3.0, 0.0])                 # turned by 90 degrees and 2 too long
    y[~c_mask] *= -1                                   # padding, all wrong
    p = torch.tensor([[5.0, 5, -5], [5, -5, -5]])      # log(1 + e^-5) from right
    right, wrong = math.log(1 + math.exp(-5)), math.log(1 + math.exp(5))
    cfg = Config(length_weight=0.3)
    loss = align(cfg, y, p, c, c_mask)
    assert loss.item() == pytest.approx(1 / 3 + 0.3 * 4 / 3 + right, rel=1e-5)
    loss = align(cfg, y, p, c, c_mask, mask_text=False)
    expected = (1 + 3 * 2) / 6 + 0.3 * 4 / 6 + (right + wrong) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------- the data
CAPTIONS = [f"caption {i}" for i in range(40)]
PARALLEL = [(f"Satz {i}", f"sentence {i}") for i in range(40)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_texts_are_the_empty_prompt_captions_for_themselves_and_pairs(share):
    cfg = Config(english_share=share, batch_size=30)
    batches = [llm_adapter.sample_pairs(cfg, CAPTIONS, PARALLEL, step) for step in range(40)]
    assert all(len(batch) == 30 and batch.count(("", "")) == 1 for batch in batches)
    texts = {pair for batch in batches for pair in batch[1:]}
    captions = {(caption, caption) for caption in CAPTIONS} if share else set()
    assert texts == captions | (set(PARALLEL) if share < 1 else set())
    count = sum(text == english for batch in batches for text, english in batch[1:])
    assert count == pytest.approx(share * 40 * 29, abs=0.05 * 40 * 29)
    assert batches[3] == llm_adapter.sample_pairs(cfg, CAPTIONS, PARALLEL, 3) != batches[4]
    alone = llm_adapter.sample_pairs(cfg, CAPTIONS, [], 3)                # without pairs
    assert all(text == english for text, english in alone) and len(alone) == 30


def test_the_best_images_are_kept(coco, tmp_path):
    path = tmp_path / "scores.json"
    scores = {f"{i:012d}.jpg": (7 * i) % 12 for i in range(12)}
    common.write_json(path, scores)

    def kept(**changes):
        cfg = Config(**dict(quality=str(path), quality_split="train") | changes)
        return [scores[path.name] for path, _, _ in llm_adapter.best_items(cfg, coco, 16)]
    assert kept(best=0.25) == [11, 10, 9]
    assert kept(best=0.01) == [11]                                        # at least one
    annotations = coco / "annotations" / "captions_train2017.json"
    content = json.loads(annotations.read_text())
    for image in content["images"]:
        image["beauty"] = -scores[image["file_name"]]
    annotations.write_text(json.dumps(content))
    assert kept(best=0.25, quality="beauty") == [0, 1, 2]
    # own data without scores, or without the toy world's split "quality": both flags are named
    for changes, words in (
            (dict(quality="good"), "--quality good --quality-split train: 12 of 12 .*00.jpg"),
            (dict(quality_split="quality"), "--quality-split quality: .*captions_quality2017")):
        with pytest.raises(common.UserError, match=f"{words}.*--stages 2"):
            kept(**changes)
    common.write_json(path, scores | {"000000000003.jpg": float("nan")})
    with pytest.raises(common.UserError, match="1 of 12 images have no score .000000000003.jpg"):
        kept()


def test_images_of_one_name_in_two_folders_have_their_own_scores(tmp_path):
    for folder, grey in (("a", 10), ("b", 200)):
        (tmp_path / folder).mkdir()
        for name in ("1", "2"):
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / folder / f"{name}.png")
            (tmp_path / folder / f"{name}.txt").write_text("a grey square")
    scores = {"a/1.png": 1.0, "b/1.png": 4.0, "a/2.png": 3.0, "b/2.png": 2.0}
    common.write_json(tmp_path / "scores.json", scores)
    cfg = Config(quality=str(tmp_path / "scores.json"), quality_split="train", best=0.01)
    (path, _, annotation), = llm_adapter.best_items(cfg, tmp_path, 8)
    items = image_data.CaptionedImages(tmp_path, "train", 8).items
    highest = max(items, key=lambda item: scores[item[2]["file_name"]])
    assert path == highest[0] and str(path).endswith(annotation["file_name"])


# ------------------------------------------------------------------------------------- the stages
@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder):
    """A folder with images, scores, pairs, an LLM and a base, and a finished training in run/."""
    folder = tmp_path_factory.mktemp("world")
    make_coco(folder / "coco")
    make_llm(folder / "llm")
    save_run(tiny_pipeline(clip_folder), folder / "base")
    lines = [json.dumps({"text": f"Bild {i}", "english": f"picture {i}"}) for i in range(9)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    common.write_json(folder / "scores.json", {f"{i:012d}.jpg": i for i in range(12)})
    status, _, errors = train(folder)
    assert status == 0, errors
    return folder


def train(folder, *more, out="run"):
    return run("llm_adapter.py", "--train", "--base", "base", "--llm", "llm", "--data", "coco",
               "--parallel", "pairs.jsonl", "--quality", "scores.json", "--quality-split", "train",
               "--out", out, *FLAGS, *more, cwd=folder)


def changed(before, after, part=""):
    """Whether any tensor whose name starts with `part` differs."""
    assert set(before) == set(after)
    return any(not torch.equal(before[name], after[name])
               for name in before if name.startswith(part))


def test_each_stage_changes_what_it_trains_and_is_a_run_that_draws(world):
    weights = [load_file(world / "run" / stage / "model.safetensors") for stage in STAGES]
    start = {f"uvit.{name}": tensor
             for name, tensor in load_file(world / "base" / "model.safetensors").items()}
    assert not changed(start, {name: weights[0][name] for name in start})          # stage 1
    assert changed(*weights[:2], "adapter.") and changed(*weights[:2], "uvit.")    # stage 2
    assert not changed(*weights[1:], "adapter.") and changed(*weights[1:], "uvit.")
    assert not changed(weights[2], load_file(world / "run" / "model.safetensors"))
    for path in ("run", "run/stage1", "run/stage2/model.safetensors"):
        status, _, errors = run("sample.py", "ein Mann", "二匹の馬 🐎", "--run", path,
                                "--sample-steps", 2, "--device", "cpu", cwd=world)
        assert status == 0, errors
    assert (world / "run" / "samples" / "validation.png").exists()
    for stage, steps, lr, muon_lr in zip(STAGES, (3, 2, 2), (2e-3, 1e-4, 5e-5), (2e-2, 5e-4, 5e-4)):
        config = json.loads((world / "run" / stage / "config.json").read_text())
        assert (config["steps"], config["lr"], config["muon_lr"]) == (steps, lr, muon_lr)
        state = torch.load(world / "run" / stage / "state.pt", weights_only=True)
        for optimizer in state["parts"][2:]:                  # the rate has fallen to zero
            assert optimizer["param_groups"][0]["lr"] == pytest.approx(0)


@pytest.fixture
def parts(world):
    """cfg, model, base and LLM as the stages take them; the adapter has no zeros."""
    base = uvit_fusion.load_pipeline(world / "base", torch.device("cpu"), torch.float32)
    llm = encoders.LLMEncoder(world / "llm", 0)
    cfg = Config(**SMALL | dict(grad_clip=0.0, caption_dropout=0.5))
    model = llm_adapter.new_model(cfg, base, llm, CAPTIONS, Adapter)
    for parameter in model["adapter"].parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return cfg, model, base, llm


ARGS = SimpleNamespace(resume=False, overwrite=False)


def test_stage_1_aligns_the_llm_with_the_text_encoder_the_longest_texts_apart(
        parts, tmp_path, monkeypatch):
    cfg, model, base, llm = parts
    calls, gradients = [], []

    def three_numbers(cfg, adapter, *batch):
        gradients.append(adapter.out.bias.grad)                        # of the step before
        calls.append(batch)
        return adapter.out.bias[len(calls) % 2]                        # [1] of the short texts
    monkeypatch.setattr(llm_adapter, "alignment_loss", three_numbers)
    texts = (CAPTIONS, PARALLEL)
    llm_adapter.train_stage(1, cfg, model, base, llm, texts, tmp_path / "run", ARGS)
    assert gradients[2][:3].tolist() == [0.25, 0.75, 0.0] and len(calls) == 6
    pairs = llm_adapter.sample_pairs(cfg, CAPTIONS, PARALLEL, 1)
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    for part, (h, h_mask, c, c_mask, mask_text) in zip((pairs[:6], pairs[6:]), calls):
        texts, english = zip(*part)
        for found, expected in ((h, llm(list(texts))[0]), (h_mask, llm(list(texts))[1]),
                                (c, base.text_encoder(list(english))[0]),
                                (c_mask, base.text_encoder(list(english))[1])):
            assert torch.allclose(found.float(), expected.float(), atol=1e-5)
        assert mask_text is True
    saved = load_file(tmp_path / "run" / "model.safetensors")          # what the next starts from
    assert not changed(saved, model.state_dict())


def test_stage_1_learns_to_stand_in_for_the_text_encoder(parts, tmp_path):
    cfg, model, base, llm = parts
    cfg.steps_1 = 60
    cfg.lr_1 = 5e-3
    pairs = [("ein Mann", "a man on a horse"), ("zwei rote Kreise", "two red circles")]
    texts = (["a man on a horse"], pairs)
    llm_adapter.train_stage(1, cfg, model, base, llm, texts, tmp_path / "run", ARGS)
    encoder = AdaptedEncoder(llm, model["adapter"], torch.float32)
    y, mask = encoder(["ein Mann", "zwei rote Kreise", ""])
    c, c_mask = base.text_encoder(["a man on a horse", "two red circles", ""])
    assert F.cosine_similarity(y[c_mask], c[c_mask], dim=-1).mean() > 0.8
    assert (mask == c_mask).float().mean() > 0.8 and mask.sum(1).argmin() == 2


@pytest.mark.parametrize("n", [2, 3])
def test_stages_2_and_3_denoise_with_what_the_adapter_makes_of_the_captions(
        n, parts, world, tmp_path, monkeypatch):
    cfg, model, base, llm = parts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right_loss = uvit_fusion.diffusion_loss
    calls = []

    def noting(network, diffusion, *batch):
        calls.append(batch)
        return right_loss(network, diffusion, *batch)
    monkeypatch.setattr(uvit_fusion, "diffusion_loss", noting)
    dataset = base.dataset(world / "coco", "train")
    llm_adapter.train_stage(n, cfg, model, base, llm, dataset, tmp_path / "run", ARGS)
    assert changed(before, model.state_dict(), "adapter.") == (n == 2)
    assert changed(before, model.state_dict(), "uvit.")
    adapter = Adapter(cfg, 16, 16, 32)
    adapter.load_state_dict({name[8:]: tensor for name, tensor in before.items()
                             if name.startswith("adapter.")})
    known = ["", *(text for _, texts, _ in dataset.items for text in texts)]
    y, y_mask = AdaptedEncoder(llm, adapter, torch.float32)(known)
    images = torch.stack([base.encode(dataset.image(i)[None])[0] for i in range(12)])
    (x_0, t, eps, text, mask), second = calls
    seen = []
    for i in range(8):
        k = (y - text[i]).abs().amax((1, 2)).argmin().item()
        assert torch.allclose(text[i], y[k], atol=1e-4) and torch.equal(mask[i], y_mask[k])
        image = (images - x_0[i]).abs().amax((1, 2, 3)).argmin().item()
        assert torch.equal(x_0[i], images[image])
        assert k == 0 or (k - 1) // 5 == image                           # five captions an image
        seen.append(known[k])
    assert 1 <= seen.count("") <= 7
    assert abs(eps.std() - 1) < 0.1 and t.min() >= 1
    assert not torch.equal(eps, second[2]) and not torch.equal(x_0, eps)


def test_on_a_gpu_all_stages_and_samples_work(world, pretended_gpu):
    status, _, errors = train(world, out="on_gpu")
    assert status == 0, errors
    status, _, errors = run("sample.py", "ein Mann", "--run", "on_gpu", cwd=world)
    assert status == 0, errors


def test_stages_one_by_one_and_interrupted_end_as_in_one_go(world, monkeypatch):
    assert train(world, "--stages", 1, out="steps")[0] == 0
    right_loss = uvit_fusion.diffusion_loss
    calls = []

    def stop_at_the_second(*batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right_loss(*batch)
    monkeypatch.setattr(uvit_fusion, "diffusion_loss", stop_at_the_second)
    monkeypatch.setattr(common.Run, "due", lambda self, step: True)
    assert train(world, "--stages", 2, "--resume", out="steps")[0] == 130
    assert not (world / "steps" / "stage3").exists()
    with monkeypatch.context() as patch:
        patch.setattr(llm_adapter, "alignment_loss", None)                # stage 1 is finished
        assert train(world, "--stages", 3, "--resume", out="steps")[0] == 0 and len(calls) == 5
    refused(train(world, "--stages", 2, "--resume", out="steps"), "--stages 2: steps/stage3/")
    for stage in STAGES:
        whole = load_file(world / "run" / stage / "model.safetensors")
        steps = load_file(world / "steps" / stage / "model.safetensors")
        assert all(torch.allclose(whole[name], steps[name], atol=1e-6) for name in whole)
    assert train(world, "--stages", 1, "--overwrite", out="steps")[0] == 0
    assert not (world / "steps" / "stage2").exists()     # it does not continue this stage 1


def test_slips_and_another_llm_or_base_are_refused_in_one_line(world, clip_folder):
    refused(train(world), "run/ already holds a run")
    refused(train(world, "--width", 15, out="new"), "--width 15", "--heads")
    refused(train(world, "--quality", "beauty", out="new"), "--quality beauty", "12 of 12")
    refused(train(world, "--parallel", "nowhere", out="new"), "--parallel nowhere")
    refused(train(world, "--base", "nowhere", out="new"), "nowhere")
    refused(train(world, "--data", "shapes", "--font", "nowhere.ttf", out="new"),
            "--font nowhere.ttf")
    assert not (world / "new").exists()
    refused(run("sample.py", "ein Mann", "--run", "run", "--clip", "other", cwd=world),
            "--clip has no effect")
    shutil.copytree(world / "llm", world / "put_away")
    make_llm(world / "llm", seed=5)
    refused(run("sample.py", "ein Mann", "--run", "run", "--device", "cpu", cwd=world),
            "llm is not the language model that run/ was trained with")
    refused(train(world, "--resume"), "llm_identity")
    shutil.rmtree(world / "llm")
    shutil.move(world / "put_away", world / "llm")
    save_run(tiny_pipeline(clip_folder, seed=5, guidance=2.0), world / "other")
    refused(train(world, "--resume", "--base", "other"), "base = base, now it is other")
    for stage in STAGES:                                    # and nothing of the run has changed
        assert common.read_json(world / "run" / stage / "uvit.json")["guidance"] == 3.0


# --------------------------------------------------------------------------- grading and comparing
def test_a_grade_compares_languages_and_stages(toy_data, clip_folder, tmp_path, monkeypatch):
    scenes, captions, _ = judge.validation_scenes(toy_data, 20)
    prompts = multilingual.validation_prompts(scenes, captions)
    assert list(prompts) == [*language.LANGUAGES, "long", "turns"] and all(
        len(texts) == 20 for texts in prompts.values())
    assert prompts["turns"][2::4] == prompts["german"][2::4] != prompts["english"][2::4]
    everything = sum(prompts.values(), [])
    base = Painter(captions, toy_data, clip_folder)
    stages = {1: Painter([], toy_data, clip_folder), 2: Painter(everything, toy_data, clip_folder),
              3: Painter(everything[:50], toy_data, clip_folder)}
    scorer = tmp_path / "quality.safetensors"
    common.save_tensors({"weight": torch.zeros(1, 32), "bias": torch.ones(1)}, scorer)
    monkeypatch.setattr(models, "SCORER", scorer)
    monkeypatch.setattr(models, "CLIP_FOLDER", Path(clip_folder))
    args = SimpleNamespace(samples=20, sample_steps=2, font=None)
    figures = multilingual.report(base, stages, toy_data, tmp_path, args)
    assert figures["clip_english"] == figures["english"] == figures["spanish"] == 100
    assert figures["clip_german"] == figures["clip_long"] == figures["chinese"] == 0
    assert figures["german"] == pytest.approx(50) == figures["german_gap"]
    assert (figures["chinese_gap"], figures["english_gap"], figures["stage1"]) == (100, 0, 0)
    assert figures["stage2"] == 100 and figures["stage3"] < 100
    assert figures["stage3_loss"] == pytest.approx(100 - figures["stage3"])
    assert figures["quality_before"] == figures["quality_after"] == 1
    for name in ("languages", "long"):
        assert (tmp_path / "samples" / f"{name}.png").stat().st_size > 0


def test_languages_that_no_training_pair_has_are_graded_by_both(
        toy_data, clip_folder, tmp_path, monkeypatch):
    scenes, _, _ = judge.validation_scenes(toy_data, 8)
    french = [language.tell(scene, "french", random.Random(i)) for i, scene in enumerate(scenes)]
    cfg = Config(base="base", data=str(toy_data))
    common.write_json(tmp_path / "config.json", dataclasses.asdict(cfg))
    painters = {"base": Painter([], toy_data, clip_folder),
                str(tmp_path): Painter(french[:6], toy_data, clip_folder)}
    monkeypatch.setattr(experiment.sample, "load_run", lambda path, *_: painters[path])
    experiment.unseen_languages(SimpleNamespace(
        run=str(tmp_path), samples=8, sample_steps=2, device="cpu", precision="fp32"))
    found = common.read_json(tmp_path / "results.json")
    assert (found["french"], found["italian"], found["clip_french"]) == (75, 0, 0)


def test_the_adapters_of_the_comparison():
    h, mask = some_states()
    changed_padding = torch.where(mask[..., None], h, 9.0)
    unmasked = new_adapter(experiment.UnmaskedAdapter)
    difference = (unmasked(h, mask)[0] - unmasked(changed_padding, mask)[0]).abs().amax((1, 2))
    assert difference[0] < 1e-5 and difference[1:].min() > 0.01
    mlp = new_adapter(experiment.MLPAdapter)
    y, p = mlp(h, mask)
    assert ((p > 0) == mask[:, :6]).all() and y.shape == (3, 6, 12)
    alone = mlp(h[:, 1:2], mask[:, 1:2])[0][:, 0]                          # a token by itself
    assert torch.allclose(alone, y[:, 1], atol=1e-5)


def test_random_embeddings_are_the_llms_own_in_another_order(world):
    llm = encoders.LLMEncoder(world / "llm", 0)
    table = llm.model.get_input_embeddings().weight
    before = table.clone()
    h, mask = experiment.shuffle_embeddings(Config(), llm)(["a man"])
    ids = llm.tokenizer("a man").input_ids
    assert mask.all() and torch.equal(h[0], table[ids])
    assert not torch.equal(table, before)
    assert torch.equal(table.sort(0).values, before.sort(0).values)
    assert len(set(table[:, 0].tolist()) & set(before[:, 0].tolist())) == 300       # whole rows


def test_layers_side_by_side_are_each_normalised(world):
    both = experiment.embeddings_and_last(Config(llm=str(world / "llm")),
                                          encoders.LLMEncoder(world / "llm", 0))
    texts = ["a man", "a man on a horse"]
    h, mask = both(texts)
    for i, layer in enumerate((0, -1)):
        expected, expected_mask = encoders.LLMEncoder(world / "llm", layer)(texts)
        part = h[..., 16 * i:16 * (i + 1)]
        assert torch.allclose(part, F.layer_norm(expected, (16,)), atol=1e-5)
        assert torch.equal(mask, expected_mask) and both.dim == h.shape[2] == 32


class WordLLM:
    """Stands in for an LLM: each token has its own vector as its state; texts are words."""
    length = 9

    def __init__(self, words):
        self.words = ["<start>", *words]
        generator = torch.Generator().manual_seed(0)
        self.table = 5 + 3 * torch.randn(len(self.words), 20, generator=generator)

    def tokenizer(self, texts):
        rows = [[self.words.index(word) for word in f"<start> {text}".split()] for text in texts]
        return SimpleNamespace(input_ids=rows)

    def __call__(self, texts):
        rows = [torch.tensor(row[:self.length]) for row in self.tokenizer(texts).input_ids]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return self.table[ids], mask


def test_a_probe_names_tokens_finds_texts_and_reads_the_last_state():
    llm = WordLLM("a b c d e f".split())
    assert experiment.own_token(llm, ["a b c", "f e d b c d e f a a", "b c", "d e f a"]).all()
    assert not experiment.own_token(llm, ["a b c", "d e f"]).any()    # not fitted to the second
    english = ["a b", "c d", "e e e f", "a b"]
    found = experiment.same_scene(llm, ["f f e", "b b a a", "d c", "a c e"], english)
    assert found.tolist() == [False, False, False, False]
    found = experiment.same_scene(llm, ["b a", "d c c", "f e", "a b a"], english)
    assert found.tolist() == [True, True, True, True]         # of equal texts, either


def test_the_colour_of_a_narrative_is_read_where_it_is_asked_for():
    scenes = [Scene((Group(1, colour, "circle"),)) for colour in shapes.COLOURS]
    captions = [f"{scene.groups[0].colour} thing" for scene in scenes]
    narratives = [language.narrative(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    colours = list(shapes.COLOURS)

    class Asked(WordLLM):
        """Knows the meaning only after the question."""
        def __call__(self, texts):
            h, mask = super().__call__(texts)
            for i, text in enumerate(texts):
                if text.endswith("?"):
                    h[i, mask[i].sum() - 1] = self.table[1 + i % 5]
            return h, mask
    words = " ".join([*captions, *narratives, *(f"{text}?" for text in captions + narratives)])
    llm = Asked(list(dict.fromkeys(colours + words.split())))
    llm.length = 30
    assert experiment.narrative_colour(llm, scenes, captions, "?").all()
    assert not experiment.narrative_colour(llm, scenes, captions, "").all()


def test_on_a_gpu_layers_are_probed(toy_data, base, world, tmp_path, monkeypatch, pretended_gpu):
    monkeypatch.setattr(toy, "prepare", lambda *flags: toy_data)
    status, _, errors = run("experiments.llm_adapter", "probe", "--base", base, "--llm",
                            world / "llm", "--out", "out", "--samples", 16, cwd=tmp_path)
    assert status == 0, errors


def test_a_probe_writes_what_each_layer_knows(toy_data, base, world, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "prepare", lambda *flags: toy_data)
    status, table, errors = run("experiments.llm_adapter", "probe", "--base", base, "--llm",
                                world / "llm", "--out", "out", "--samples", 16, "--device", "cpu",
                                cwd=tmp_path)
    assert status == 0, errors
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("token", "scene", "colour", "asked"):
        assert {f"layer{n}_{name}" for n in (0, 1, 2)} <= set(figures)
    assert "own token" in table


def test_a_comparison_keeps_what_is_finished(toy_data, base, world, tmp_path, monkeypatch):
    shutil.copytree(toy_data, tmp_path / "shapes")
    language.build_parallel(tmp_path / "shapes")
    monkeypatch.setattr(toy, "prepare", lambda *flags: tmp_path / "shapes")
    monkeypatch.setattr(experiment, "ABLATIONS", {"layer_last": {"llm_layer": -1},
                                                  "no_stage_1": {}})

    def compare(*more):
        return run("experiments.llm_adapter", "compare", "--base", base, "--llm", world / "llm",
                   "--out", "out", "--samples", 4, "--sample-steps", 2, *FLAGS, *more, cwd=tmp_path)
    status, table, errors = compare()
    assert status == 0, errors
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("layer_last", "no_stage_1"):
        assert name in table
        assert {name, f"{name}_ci", f"{name}_long", f"{name}_english"} <= set(figures)
    assert {path.name for path in (tmp_path / "out").glob("*/stage*")} == {"stage1", "stage2"}
    for loss in ("stage1_loss", "stage2_3_loss"):
        monkeypatch.setattr(llm_adapter, loss, None)                     # nothing is trained again
    assert compare()[1].splitlines()[-4:] == table.splitlines()[-4:]
    refused(compare("--seed", 1), "layer_last/stage1/ was started with seed = 0, now it is 1")
