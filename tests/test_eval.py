"""eval.py: a run is graded by the exact judge; CLIP score, CMMD and FID are those of the papers."""
import hashlib
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused, run, save_run, tiny_pipeline
from PIL import Image

import common
import encoders
import eval as grading
import image_data
import uvit_fusion
from toy import by_noise, judge, shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
DEVICE = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------ exact grades
@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, clip_folder, toy_data):
    """A working folder with runs/uvit_fusion, a random U-ViT of the small toy world."""
    folder = tmp_path_factory.mktemp("work")
    pipeline = tiny_pipeline(clip_folder, size=24, patch=8, data=str(toy_data))
    save_run(pipeline, folder / "runs" / "uvit_fusion")
    weights = folder / "runs/uvit_fusion/step1400.safetensors"
    common.save_tensors(pipeline.model.state_dict(), weights)
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_is_graded_on_held_out_captions_and_its_figures_are_written(toy_run):
    flags = ["--samples", 16, "--sample-steps", 2, "--noise-seed", 3, *DEVICE]
    status, out, errors = run("eval.py", *flags, cwd=toy_run)
    assert status == 0, errors
    assert "16 held-out captions, 2 steps of ddpm, guidance 3" in out
    pipeline = grading.sample.load_run(toy_run / "runs/uvit_fusion", "cpu", "fp32")
    expected, _ = judge.accuracy(pipeline, pipeline.cfg.data, 16, steps=2, seed=3)
    found = results(toy_run / "runs" / "uvit_fusion")
    assert {"all", "all_ci", "count", "colour", "shape", "relation", "samples"} <= set(found)
    assert {"commit", "machine", "command"} <= set(found)
    assert found["samples"] == 16
    assert all(found[name] == pytest.approx(expected[name], abs=0.01) for name in expected)


def test_own_data_have_no_exact_grade_but_a_quality(toy_run, coco):
    refused(run("eval.py", "--data", coco, *DEVICE, cwd=toy_run), "eval.py --quality measures any")


def test_the_grade_of_a_snapshot_does_not_replace_that_of_its_run(toy_run):
    before = (toy_run / "runs" / "uvit_fusion" / "results.json")
    before.unlink(missing_ok=True)
    flags = ["--run", "runs/uvit_fusion/step1400.safetensors", "--samples", 4, "--sample-steps", 1]
    status, out, errors = run("eval.py", *flags, *DEVICE, cwd=toy_run)
    assert status == 0 and "step1400.safetensors: 4 held-out captions" in out, errors
    assert not before.exists()
    assert results(toy_run / "runs" / "uvit_fusion" / "step1400")["samples"] == 4


# ------------------------------------------------------------------------------ loss by noise level
def words_of(caption, table):
    """The words of a caption that are in a table of synonyms, as first synonyms, sorted."""
    first = {synonym: name for name, synonyms in table.items() for synonym in synonyms}
    return sorted(first[word] for word in caption.replace("s ", " ").rstrip("s").split()
                  if word in first)


def test_a_wrong_caption_differs_in_one_field():
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng) for _ in range(200)]
    captions = by_noise.captions_by_field([scene for scene in scenes if scene.relation])
    assert list(captions) == ["right", "count", "colour", "shape", "relation"]
    for right, count, colour, shape, relation in zip(*captions.values()):
        for table, changed in ((shapes.ADJECTIVES, colour), (shapes.NOUNS, shape)):
            same = [words_of(caption, table) for caption in (right, count, colour, shape, relation)
                    if caption != changed]
            assert same == 4 * [same[0]] and words_of(changed, table) != same[0]
        assert len({right, count, colour, shape, relation}) == 5
    assert captions == by_noise.captions_by_field([scene for scene in scenes if scene.relation])


def test_the_loss_of_each_image_is_that_of_training(toy_run):
    pipeline = grading.sample.load_run(toy_run / "runs/uvit_fusion", "cpu", "fp32")
    x_0 = torch.rand(5, 3, 24, 24) * 2 - 1
    eps = torch.randn(5, 3, 24, 24)
    captions = ["two red circles", "a blue square", "one disc", "three green triangles", "a man"]
    y, mask = by_noise.encode_text(pipeline, captions)
    found = by_noise.losses(pipeline, x_0, y, mask, 700, eps, batch_size=2)
    for i, caption in enumerate(captions):
        expected = uvit_fusion.diffusion_loss(
            pipeline.model, pipeline.diffusion, x_0[i:i + 1], torch.tensor([700]), eps[i:i + 1],
            *pipeline.text_encoder([caption]))
        assert found[i] == pytest.approx(expected.item(), rel=1e-4)


def test_the_rise_of_the_loss_is_a_mean_over_images(tmp_path, capsys):
    found = {"right": np.array([[1.0, 3.0]])} | {
        field: np.array([[1.0 + k, 3.0 - k / 2]]) for k, field in enumerate(shapes.FIELDS)}
    found = {name: losses.repeat(len(by_noise.TIMESTEPS), 0) for name, losses in found.items()}
    figures = by_noise.report(found, "", tmp_path / "by_noise.png")
    assert figures["by_noise_images"] == 2 and figures["loss_700"] == 2
    rises = [figures[f"{field}_rise_700"] for field in shapes.FIELDS]
    assert rises == pytest.approx([0, 0.25, 0.5, 0.75])
    assert [figures[f"{field}_apart_700"] for field in shapes.FIELDS] == [0, 50, 50, 50]
    assert figures["relation_rise_700_ci"] == pytest.approx(1.96 * 2.25 / 2**0.5)
    assert "0.7500" in capsys.readouterr().out and (tmp_path / "by_noise.png").exists()


def test_losses_by_noise_level_are_a_table_a_picture_and_results(toy_run):
    flags = ["--by-noise", "--samples", 12, "--noise-seed", 3, "--out", "noise", *DEVICE]
    status, out, errors = run("eval.py", *flags, cwd=toy_run)
    assert status == 0 and "right and wrong captions, by noise level" in out, errors
    found = results(toy_run / "noise")
    assert (toy_run / "noise" / "by_noise.png").exists()
    pipeline = grading.sample.load_run(toy_run / "runs/uvit_fusion", "cpu", "fp32")
    scenes, _, _ = judge.validation_scenes(pipeline.cfg.data, 12)
    assert found["by_noise_images"] == sum(scene.relation is not None for scene in scenes)
    again = by_noise.measure(pipeline, pipeline.cfg.data, 12, seed=3)
    assert found["loss_1000"] == pytest.approx(again["right"][-1].mean(), rel=1e-3)
    other = by_noise.measure(pipeline, pipeline.cfg.data, 12, seed=4)
    assert found["loss_1000"] != pytest.approx(other["right"][-1].mean(), rel=1e-3)


def test_scenes_without_a_relation_have_none_to_change(toy_run, monkeypatch):
    scene = shapes.Scene((shapes.Group(1, "red", "circle"),))
    monkeypatch.setattr(judge, "validation_scenes", lambda *_: ([scene], ["a red circle"], [False]))
    refused(run("eval.py", "--by-noise", "--samples", 1, *DEVICE, cwd=toy_run), "--samples 1: none")


@pytest.mark.parametrize("flags, word", [
    (["--by-noise", "--quality"], "not allowed with argument"),
    (["--by-noise", "--guidance", 2], "--guidance has no effect here"),
    (["--by-noise", "--sample-steps", 2], "--sample-steps has no effect here"),
    (["--by-noise", "--workers", 2], "--workers has no effect here: it needs --quality"),
    (["--inception", "some.pt"], "--inception has no effect here: it needs --quality"),
])
def test_a_flag_of_another_measure_is_refused(toy_run, flags, word):
    refused(run("eval.py", *flags, cwd=toy_run), word)


# --------------------------------------------------------------------------------------------- FID
def test_fid_of_two_normal_distributions_is_the_closed_form(rng):
    a = rng.uniform(0.1, 3, 12)
    b = rng.uniform(0.1, 3, 12)
    shift = rng.normal(size=12)
    # only mean and covariance of the features count: these have exactly 0 and diag(a^2), and
    # shift and diag(b^2)
    corners = np.concatenate([np.eye(12), -np.eye(12)]) * (23 / 2)**0.5
    x = corners * a
    y = corners * b + shift
    expected = (shift**2).sum() + ((a - b)**2).sum()
    assert common.frechet_distance(x, y) == pytest.approx(expected)
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]            # the same in other axes
    assert common.frechet_distance(x @ turn.T, y @ turn.T) == pytest.approx(expected)


@pytest.mark.parametrize("count", [9, 200])                      # 9: a singular covariance
def test_fid_is_that_of_scipys_matrix_root(rng, count):
    linalg = pytest.importorskip("scipy.linalg")
    x = rng.normal(size=(count, 20)) @ rng.normal(size=(20, 20)) + 10
    y = rng.normal(size=(41, 20)) @ rng.normal(size=(20, 20))
    s_x, s_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(s_x @ s_y).real
    expected = ((x.mean(0) - y.mean(0))**2).sum() + np.trace(s_x + s_y - 2 * root)
    assert common.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    # float32 features, as networks give them, of a set against itself
    features = torch.tensor(x, dtype=torch.float32)
    assert common.frechet_distance(features, features) < 1e-4


# -------------------------------------------------------------------------------------------- CMMD
def test_cmmd_is_1000_times_the_squared_mean_discrepancy(rng, monkeypatch):
    x = unit(rng.normal(size=(70, 16)))
    y = unit(rng.normal(size=(300, 16)) + 1)                     # more than one chunk of rows

    def mean_kernel(a, b):
        return np.mean([[np.exp(-((p - q)**2).sum() / (2 * 10**2)) for q in b] for p in a])

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert expected > 1
    assert grading.cmmd(x, y) == pytest.approx(expected)
    assert grading.cmmd(y, x) == pytest.approx(expected)
    assert abs(grading.cmmd(y, y[::-1])) < 1e-9


# -------------------------------------------------------------------------------------- CLIP score
@pytest.fixture(scope="module")
def large_clip(tmp_path_factory):
    """A CLIP with random weights that reads 224 x 224 pixels, as the published ones do."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from toy.models import train_tokenizer
    folder = tmp_path_factory.mktemp("clip") / "large"
    tokenizer = train_tokenizer(["A photo depicts picture 1 in way 2"], vocabulary=300, length=40)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0,
                bos_token_id=2, eos_token_id=3)
    vision = dict(image_size=224, patch_size=112)
    torch.manual_seed(3)                                         # most of its cosines are above 0
    model = CLIPModel(CLIPConfig(
        text_config=tower | text, vision_config=tower | vision, projection_dim=16))
    model.visual_projection.weight.data.normal_()
    model.text_projection.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    processor.save_pretrained(folder)
    return str(folder)


def noisy_images(rng, count, width=32, height=32):
    coarse = rng.integers(0, 255, (count, 3, 3, 3), dtype=np.uint8)
    images = [Image.fromarray(image).resize((width, height)) for image in coarse]
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("width, height", [(64, 48), (300, 400), (224, 224)])
def test_clip_score_is_that_of_transformers(rng, large_clip, width, height):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
    images = noisy_images(rng, 300, width, height)[:3]
    captions = ["picture 3", "a longer text in way 2", "way " * 60]       # the last one is cut off
    model = CLIPModel.from_pretrained(large_clip).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(large_clip)(list(images), return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(large_clip)(
        [f"A photo depicts {caption}" for caption in captions], padding=True, truncation=True,
        max_length=40, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, **pixels)
    cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    clip = encoders.ClipScorer(large_clip)
    scores = grading.clip_score(clip, clip.images(images), captions, batch_size=2)
    assert scores == pytest.approx(2.5 * cosines.clamp(min=0).numpy(), abs=0.02)
    assert np.abs(scores).max() > 0.2


def test_clip_score_is_between_0_and_2_point_5_and_reads_the_papers_prefix(large_clip, clip_folder):
    clip = encoders.ClipScorer(large_clip)
    text = clip.texts(["A photo depicts two squares"])
    image = torch.cat([text, -text])
    scores = grading.clip_score(clip, image, ["two squares"] * 2)
    assert scores == pytest.approx([2.5, 0], abs=1e-5)
    tiny = encoders.ClipScorer(clip_folder)                        # has never read that prefix
    scores = grading.clip_score(tiny, tiny.texts(["two squares"]), ["two squares"])
    assert scores == pytest.approx([2.5], abs=1e-5)


# ----------------------------------------------------------------------------------- image quality
class StandIn(torch.nn.Module):
    """For Inception: the mean colours of the quarters, or nothing unless features are wanted."""
    def forward(self, x, return_features: bool = False):
        if x.dtype != torch.uint8 or not return_features:
            return x[:0].float()
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.script(StandIn()).save(path)
    return path


class StandInPipeline:
    """Its images depend on the prompt and on the number of the image alone."""
    device = torch.device("cpu")
    image_size = 32

    def __init__(self):
        self.prompts = []

    def generate(self, prompts, first=0, batch_size=256, **sampling):
        assert len(prompts) <= batch_size and sampling == {"steps": 7}
        self.prompts += prompts
        seeds = [list(f"{first + i} {prompt}".encode()) for i, prompt in enumerate(prompts)]
        return np.concatenate([noisy_images(np.random.default_rng(seed), 1) for seed in seeds])


def test_generated_images_are_measured_against_their_captions_and_the_real_images(
        large_clip, coco, inception):
    pipeline = StandInPipeline()
    network = grading.Inception(inception)
    clip = encoders.ClipScorer(large_clip)
    dataset = image_data.CaptionedImages(coco, "val", 32)
    figures = grading.quality(pipeline, dataset, 150, clip, network, {"steps": 7})
    items = dataset.items
    captions = [random.Random(i).choice(items[i % 4][1]) for i in range(150)]
    assert pipeline.prompts == captions                          # four images: they repeat
    generated = pipeline.generate(captions, batch_size=150, steps=7)
    real = np.stack([image_data.load_image(path, 32) for path, _, _ in items])
    x = clip.images(generated)
    scores = clip.score(x, captions).numpy()
    assert set(figures) == {"clip_score", "clip_score_ci", "clip_score_real", "cmmd", "fid",
                            "quality_samples"}
    assert figures["quality_samples"] == 150
    assert figures["clip_score"] == pytest.approx(scores.mean(), abs=1e-4)
    assert figures["clip_score_ci"] == pytest.approx(1.96 * scores.std() / 150**0.5, abs=1e-4)
    assert figures["clip_score_real"] == pytest.approx(
        clip.score(clip.images(real), captions[:4]).mean().item(), abs=1e-4)
    assert figures["cmmd"] == pytest.approx(grading.cmmd(x, clip.images(real)), abs=1e-3)
    expected = common.frechet_distance(network(generated), network(real))
    assert expected > 1 and figures["fid"] == pytest.approx(expected, rel=1e-3)


def test_inception_says_which_file_it_runs_and_need_not_have_flags(inception, tmp_path, capsys):
    network = grading.Inception(inception)
    top = np.zeros((1, 4, 8, 3), np.uint8)
    top[:, :2] = 200
    assert network(top).tolist() == [[200, 200, 0, 0] * 3]       # of each colour: the quarters
    assert hashlib.sha256(inception.read_bytes()).hexdigest() in capsys.readouterr().out

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))
    example = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    torch.jit.trace(Mean(), example).save(tmp_path / "traced.pt")
    images = np.full((5, 40, 30, 3), 7, np.uint8)
    assert grading.Inception(tmp_path / "traced.pt")(images).tolist() == [[7.0] * 3] * 5


def test_toy_figures_never_bear_the_names_of_real_ones(toy_run, inception):
    flags = ["--quality", "--sample-steps", 1, "--inception", inception, "--out", "out", *DEVICE]
    status, out, errors = run("eval.py", *flags, cwd=toy_run)
    assert status == 0, errors
    found = results(toy_run / "out")
    assert set(found) - {"commit", "machine", "command"} == {
        "tiny_clip_score", "tiny_clip_score_ci", "tiny_clip_score_real", "tiny_clip_distance",
        "toy_inception_distance", "quality_samples"}
    assert found["quality_samples"] == 64                        # all held-out captions
    table = out[out.index("figure"):]
    assert "tiny_clip_score_real" in table and "fid" not in table and "cmmd" not in table


def test_word_embeddings_measure_no_images(toy_data):
    pipeline = SimpleNamespace(image_size=24, cfg=SimpleNamespace(clip="runs/mine/words"))
    args = SimpleNamespace(clip_model=None, samples=4)
    with pytest.raises(common.UserError, match="name a CLIP with --clip-model"):
        grading.measure_quality(args, pipeline, toy_data, "")


def test_a_snapshot_has_a_folder_of_its_own():
    def folder(run, weights=None):
        return str(grading.sample.output_folder(SimpleNamespace(run=run, weights=weights)))
    assert folder("runs/a") == "runs/a"
    assert folder("runs/a/step1400.safetensors") == "runs/a/step1400"
    assert folder("runs/a", "downloads/small.pth") == "runs/small"


@pytest.mark.parametrize("flag, value, word", [
    ("--inception", "missing.pt", "missing.pt"),
    ("--inception", "text.pt", "not a TorchScript"),
    ("--inception", "pickle.pt", "not a TorchScript"),
    ("--inception", "other.pt", "features (B, D)"),
    ("--clip-model", "nowhere", "cannot be loaded as a CLIP"),
    ("--samples", 1, "at least 2"),
])
def test_a_slip_is_one_line_before_anything_is_generated(
        toy_run, inception, tmp_path, monkeypatch, flag, value, word):
    (tmp_path / "text.pt").write_text("no such thing\n" * 50)
    torch.save({"weights": torch.ones(3)}, tmp_path / "pickle.pt")
    torch.jit.script(torch.nn.Linear(3, 2)).save(tmp_path / "other.pt")
    monkeypatch.setattr(grading, "generated_images", None)
    given = {"--inception": inception, "--out": tmp_path / "out"}
    given[flag] = tmp_path / value if "." in str(value) else value
    flags = [part for pair in given.items() for part in pair]
    refused(run("eval.py", "--quality", *flags, *DEVICE, cwd=toy_run), word)
