"""Picture quality: distances against closed forms and other implementations, scores against the drawn caption, long runs that are cut off."""
import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import common
import eval as grade
import uvit_fusion
from toy import shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
RNG = np.random.default_rng(0)


def gaussian(dim, rank=None):
    """A random mean and covariance, of full rank unless told."""
    a = RNG.normal(size=(dim, rank or 2 * dim))
    return RNG.normal(size=dim), a @ a.T / a.shape[1]


@pytest.fixture(scope="module")
def large_clip(tmp_path_factory):
    """A CLIP of random weights that looks at 224 x 224 pixels, as the published ones do; its four patches are the quarters."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from toy.experts import train_tokenizer
    folder = tmp_path_factory.mktemp("large") / "clip"
    tokenizer = train_tokenizer(["A photo depicts picture 1 told in way 2"], vocabulary=300, length=40)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    words = dict(vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    torch.manual_seed(3)                                                                  # most of its cosines are above 0
    model = CLIPModel(CLIPConfig(text_config=tower | words, vision_config=tower | dict(image_size=224, patch_size=112), projection_dim=16))
    model.visual_projection.weight.data.normal_()
    model.text_projection.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return str(folder)


class StandIn(torch.nn.Module):
    """For Inception: mean colours of the quarters, or nonsense unless features are asked for."""
    def forward(self, x, return_features: bool = False):
        if x.dtype != torch.uint8 or not return_features:
            return x[:0].float()
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.script(StandIn()).save(path)
    return path


class Stub:
    """Draws blurred noise that depends on the prompt and on the place in the list alone; stops before batch `stop`."""
    device, precision, side = torch.device("cpu"), torch.float32, 32

    def __init__(self, clip, stop=None):
        self.settings, self.stop, self.calls = SimpleNamespace(clip=clip, size=32), stop, []

    def draw(self, prompts, first=0, batch=256, **_):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((first, list(prompts)))
        seeds = [f"{first + i} {prompt}".encode() for i, prompt in enumerate(prompts)]
        coarse = [np.random.default_rng(list(seed)).integers(0, 255, (2, 2, 3), dtype=np.uint8) for seed in seeds]
        return np.stack([np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC)) for picture in coarse])


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


# --------------------------------------------------------------------------------------------------------------- distances
def test_frechet_distance_of_gaussians_is_the_closed_form():
    def line(mean, deviation):
        return np.array([mean]), np.array([[deviation**2]])
    assert grade.frechet_distance(*line(1, 2), *line(4, 6)) == pytest.approx((1 - 4)**2 + (2 - 6)**2)
    a, b, shift = RNG.uniform(0.1, 3, 12), RNG.uniform(0.1, 3, 12), RNG.normal(size=12)
    expected = (shift**2).sum() + ((a - b)**2).sum()
    assert grade.frechet_distance(np.zeros(12), np.diag(a**2), shift, np.diag(b**2)) == pytest.approx(expected)
    turn = np.linalg.qr(RNG.normal(size=(12, 12)))[0]                                     # the same axes, turned: S_1 and S_2 commute
    assert grade.frechet_distance(np.zeros(12), turn * a**2 @ turn.T, turn @ shift, turn * b**2 @ turn.T) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [None, 7])
def test_frechet_distance_is_that_of_scipys_matrix_root(rank):
    linalg = pytest.importorskip("scipy.linalg")
    (mu_1, sigma_1), (mu_2, sigma_2) = gaussian(20, rank), gaussian(20)
    root = linalg.sqrtm(sigma_1 @ sigma_2).real
    expected = ((mu_1 - mu_2)**2).sum() + np.trace(sigma_1 + sigma_2 - 2 * root)
    assert grade.frechet_distance(mu_1, sigma_1, mu_2, sigma_2) == pytest.approx(expected, rel=1e-5)
    assert grade.frechet_distance(mu_2, sigma_2, mu_1, sigma_1) == pytest.approx(expected, rel=1e-5)


def test_statistics_are_numpys_and_a_set_is_at_no_distance_from_itself():
    rows = (RNG.normal(size=(2500, 20)) * 30 + 1000).astype(np.float32)                   # a mean far from 0, three parts of the loop
    mu, sigma = grade.statistics(rows)
    assert np.allclose(mu, rows.mean(0, dtype=np.float64)) and np.allclose(sigma, np.cov(rows.astype(np.float64), rowvar=False))
    assert grade.frechet_distance(mu, sigma, mu, sigma) < 1e-8
    few = grade.statistics(rows[:5])                                                      # fewer pictures than features: singular
    assert grade.frechet_distance(*few, *few) < 1e-3


def test_drawn_pictures_are_compared_with_as_many_real_ones(large_clip, coco):
    clip, real = grade.ClipScorer(large_clip), [common.load_picture(path, 32) for path, _, _ in common.CaptionedImages(coco, "val", 32).items]
    three, other = np.stack(real[:3]), np.stack(real[1:])
    same, apart = grade.clip_distances(clip, coco, three, other)
    one, two = (grade.statistics(clip.images(some).numpy()) for some in (three, other))
    assert same < 1e-3 < apart and apart == pytest.approx(grade.frechet_distance(*one, *two), rel=1e-4)


def test_cmmd_is_the_papers_and_needs_no_whole_matrix():
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (RNG.normal(size=(70, 16)), RNG.normal(size=(90, 16)) + 1))

    def direct(a, b):
        return np.mean([[np.exp(-((p - q)**2).sum() / (2 * 10**2)) for q in b] for p in a])
    expected = 1000 * (direct(x, x) + direct(y, y) - 2 * direct(x, y))
    assert expected > 1 and grade.cmmd(x, y) == pytest.approx(expected)
    assert grade.cmmd(x, y, size=13) == pytest.approx(expected) and grade.cmmd(y, x) == pytest.approx(expected)
    assert abs(grade.cmmd(x, x)) < 1e-9 and abs(grade.cmmd(x, x[::-1], size=13)) < 1e-9


# -------------------------------------------------------------------------------------------------------------- CLIP score
def test_clip_features_are_those_of_transformers(large_clip):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
    clip = grade.ClipScorer(large_clip)
    model, processor = CLIPModel.from_pretrained(large_clip).eval(), CLIPImageProcessorPil.from_pretrained(large_clip)
    for size in ((64, 48), (300, 400), (224, 224)):
        pictures = np.stack([np.asarray(Image.fromarray(RNG.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize(size)) for _ in range(3)])
        with torch.no_grad():
            expected = model.get_image_features(**processor(list(pictures), return_tensors="pt")).pooler_output
        cosines = (clip.images(pictures) * expected / expected.norm(dim=-1, keepdim=True)).sum(-1)     # pixels differ by 1 of 255 at most
        assert cosines.min() > 0.9999 and torch.allclose(clip.images(pictures).norm(dim=-1), torch.ones(3))
    tokens = AutoTokenizer.from_pretrained(large_clip)(["picture 3"], return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**tokens).pooler_output[0]
    together = clip.texts(["picture 3", "a longer text, " * 30])
    assert torch.allclose(together[0], expected / expected.norm(), atol=1e-5) and torch.allclose(together.norm(dim=1), torch.ones(2))


def test_clip_score_is_two_and_a_half_times_the_cosine_with_the_prefixed_caption_or_0(large_clip, clip_folder):
    clip = grade.ClipScorer(large_clip)
    text = clip.texts(["A photo depicts two squares"])
    half = torch.nn.functional.normalize(text + torch.linalg.qr(text.T)[0].T.roll(1), dim=-1)
    image = torch.cat([text, -text, half])
    expected = [2.5, 0, 2.5 * max(0, float((half * text).sum()))]
    assert clip.score(image, ["two squares"] * 3).tolist() == pytest.approx(expected, abs=1e-5)
    tiny = grade.ClipScorer(clip_folder)
    assert tiny.tiny and not clip.tiny
    assert tiny.score(tiny.texts(["two squares"]), ["two squares"]).item() == pytest.approx(2.5)       # no prefix, which it has never read


def test_pictures_are_scored_against_the_caption_that_was_drawn(large_clip, coco, tmp_path, weights):
    painter, clip = Stub(large_clip), grade.ClipScorer(large_clip)
    figures = grade.quality(painter, coco, weights, tmp_path, samples=10)
    captions = [caption for _, some in painter.calls for caption in some]
    told = [texts for _, texts, _ in common.CaptionedImages(coco, "val", 32).items]
    assert captions == [random.Random(i).choice(told[i % 4]) for i in range(10)]          # four pictures: captions come again
    image = clip.images(painter.draw(captions))
    scores, turned = clip.score(image, captions), clip.score(image, captions[1::-1] + captions[2:])
    assert figures["clip_score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert np.load(tmp_path / "quality" / "drawn.npy")[:, 16] == pytest.approx(scores.numpy(), abs=1e-5)
    assert torch.allclose(clip.score(image[[1, 0]], captions[1::-1]), scores[[1, 0]], atol=1e-5)       # pictures and captions swapped
    assert abs(turned[:2] - scores[:2]).min() > 1e-4 and torch.equal(turned[2:], scores[2:])           # captions alone


# --------------------------------------------------------------------------------------------------------------- long runs
def test_an_interrupted_run_goes_on_and_ends_with_the_same_figures(large_clip, coco, tmp_path, weights, inception, capsys):
    flags = dict(samples=300, inception=inception, batch=64)
    whole = Stub(large_clip)
    expected = grade.quality(whole, coco, weights, tmp_path / "whole", **flags)
    assert [len(some) for _, some in whole.calls] == [64, 64, 64, 64, 44]                 # never more than a batch
    first, second, third = Stub(large_clip, stop=3), Stub(large_clip), Stub(large_clip, stop=0)
    with pytest.raises(KeyboardInterrupt):
        grade.quality(first, coco, weights, tmp_path / "cut", **flags)
    assert grade.quality(second, coco, weights, tmp_path / "cut", **flags) == expected
    assert first.calls + second.calls == whole.calls                                      # nothing is drawn twice, each from its own noise
    assert grade.quality(third, coco, weights, tmp_path / "cut", **flags) == expected and not third.calls
    assert "192 of 300 pictures are done already" in capsys.readouterr().out
    assert {"clip_score", "clip_score_ci", "clip_score_real", "cmmd", "fid", "quality_samples"} == set(expected)
    whole = np.load(tmp_path / "whole" / "quality" / "drawn.npy")
    assert whole.dtype == np.float32 and whole.shape == (300, 16 + 1 + 12)


def test_features_of_other_weights_flags_or_a_cut_off_file_are_not_taken_up(large_clip, coco, tmp_path, weights, capsys):
    def draws(**more):
        painter = Stub(large_clip)
        grade.quality(painter, coco, weights, tmp_path, **dict(samples=6) | more)
        return sum(len(some) for _, some in painter.calls), capsys.readouterr().out
    assert draws()[0] == 6 and draws()[0] == 0
    count, out = draws(sampling={"guidance": 2.0})
    assert count == 6 and "another sampling: beginning anew" in out
    weights.write_bytes(b"other weights")
    count, out = draws(sampling={"guidance": 2.0})
    assert count == 6 and "another weights: beginning anew" in out
    assert draws(samples=7)[0] == 7
    rows = tmp_path / "quality" / "drawn.npy"
    rows.write_bytes(rows.read_bytes()[:200])
    with pytest.raises(common.UserError, match="drawn.npy is damaged"):
        draws(samples=7)


# --------------------------------------------------------------------------------------------------------------- Inception
def test_reference_is_the_validation_pictures_a_folder_or_statistics(large_clip, coco, tmp_path, weights, inception, capsys):
    painter = Stub(large_clip)
    flags = dict(samples=20, inception=inception)
    figures = grade.quality(painter, coco, weights, tmp_path, **flags)
    assert grade.sha256(inception) in capsys.readouterr().out
    real = np.stack([common.load_picture(path, 32) for path, _, _ in common.CaptionedImages(coco, "val", 32).items])
    drawn = painter.draw(painter.calls[0][1])
    corners = [torch.nn.functional.adaptive_avg_pool2d(torch.tensor(p).permute(0, 3, 1, 2).float(), 2).flatten(1).numpy() for p in (drawn, real)]
    (mu, sigma), other = grade.statistics(corners[0]), grade.statistics(corners[1])
    assert figures["fid"] == pytest.approx(grade.frechet_distance(mu, sigma, *other), rel=1e-4)
    clip = grade.ClipScorer(large_clip)
    assert figures["cmmd"] == pytest.approx(grade.cmmd(clip.images(drawn), clip.images(real)), abs=1e-4)
    folder = grade.quality(painter, coco, weights, tmp_path, **flags, reference=coco / "val2017")       # no captions beside the pictures
    assert folder["cmmd"] == pytest.approx(figures["cmmd"]) and folder["fid"] == pytest.approx(figures["fid"])
    assert "clip_score_real" not in folder
    read = grade.quality(painter, coco, weights, tmp_path, **flags, reference=tmp_path / "quality" / "reference.npz")
    assert read["fid"] == pytest.approx(figures["fid"]) and "cmmd" not in read
    assert "no distance of CLIP features" in capsys.readouterr().out


def test_a_traced_network_without_flags_will_do(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))
    torch.jit.trace(Mean(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).save(tmp_path / "traced.pt")
    assert grade.Inception(tmp_path / "traced.pt")(np.full((5, 40, 30, 3), 7, np.uint8)).tolist() == [[7.0] * 3] * 5


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, clip_folder):
    """A run of random weights on a small toy world: (working folder, flags)."""
    root = tmp_path_factory.mktemp("toy")
    s = uvit_fusion.Settings(dim=32, depth=2, heads=2, image_blocks=1, caption_blocks=0, text_dim=32, text_length=16, clip=clip_folder,
                             data=str(shapes.build(root / "shapes", train=4, val=40)))
    torch.manual_seed(0)
    (root / "run").mkdir()
    common.save_tensors(uvit_fusion.UViT(s).state_dict(), root / "run" / "model.safetensors")
    common.write_json(root / "run" / "config.json", dataclasses.asdict(s))
    return root, ["--quality", "--run", "run", "--sample-steps", 2, "--device", "cpu", "--precision", "fp32"]


def test_toy_figures_are_never_named_as_the_real_ones(toy_run, inception):
    root, flags = toy_run
    status, out, errors = run("eval.py", *flags, "--inception", inception, cwd=root)
    assert status == 0, errors
    results = json.loads((root / "run" / "results.json").read_text())
    measured = set(results) - {"commit", "machine", "command"}
    assert measured == {"tiny_clip_score", "tiny_clip_score_ci", "tiny_clip_score_real", "tiny_clip_distance", "toy_inception_distance",
                        "quality_samples"}
    assert results["quality_samples"] == 40                                               # all held-out captions, as they are fewer than 30 000
    table = out[out.index("drawn"):]
    assert "tiny-CLIP score" in table and "FID" not in table and "CMMD" not in table and "\nCLIP score" not in table


def test_pictures_drawn_in_parts_are_those_drawn_in_one_go(toy_run, tmp_path):
    root, _ = toy_run
    painter = uvit_fusion.load(root / "run", torch.device("cpu"), torch.float32)
    captions = [random.Random(i).choice(texts) for i, (_, texts, _) in enumerate(common.CaptionedImages(painter.settings.data, "val", 24).items)]
    grade.quality(painter, painter.settings.data, root / "run" / "model.safetensors", tmp_path, sampling={"steps": 2, "seed": 3}, batch=16)
    expected = grade.ClipScorer(painter.settings.clip).images(painter.draw(captions, steps=2, seed=3))
    assert np.allclose(np.load(tmp_path / "quality" / "drawn.npy")[:, :32], expected, atol=1e-3)


@pytest.mark.parametrize("flag, file, said", [
    ("--inception", "missing.pt", "there is no such file"),
    ("--inception", "text.pt", "no TorchScript"),
    ("--inception", "pickle.pt", "no TorchScript"),
    ("--inception", "cut.pt", "damaged"),
    ("--inception", "other.pt", "gives no features"),
    ("--reference", "missing.npz", "cannot be read"),
    ("--reference", "text.npz", "cannot be read"),
    ("--reference", "cut.npz", "cannot be read"),
    ("--reference", "array.npz", "cannot be read"),
    ("--reference", "names.npz", "holds no mu and sigma"),
    ("--reference", "small.npz", r"mu (5,) and sigma (5, 5); this --inception needs finite (12,)"),
    ("--reference", "nan.npz", "needs finite"),
    ("--reference", "nowhere", "neither a folder with pictures nor an .npz"),
    ("--clip-model", "nowhere", "cannot be loaded as a CLIP"),
    ("--samples", "1", "1 drawn and 40 real pictures are too few"),
])
def test_bad_input_is_one_line_and_status_2_before_anything_is_drawn(toy_run, inception, tmp_path, monkeypatch, flag, file, said):
    for name in ("text.pt", "text.npz"):
        (tmp_path / name).write_text("no such thing\n" * 50)
    torch.save({"weights": torch.ones(3)}, tmp_path / "pickle.pt")
    torch.jit.script(torch.nn.Linear(3, 2)).save(tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(inception.read_bytes()[:-300])
    np.savez(tmp_path / "whole.npz", mu=np.zeros(12), sigma=np.eye(12))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    with open(tmp_path / "array.npz", "wb") as array:
        np.save(array, np.zeros(12))
    np.savez(tmp_path / "names.npz", mean=np.zeros(12))
    np.savez(tmp_path / "small.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    monkeypatch.setattr(uvit_fusion.Painter, "draw", None)
    root, flags = toy_run
    given = {"--inception": inception, "--out": tmp_path / "out"} | {flag: file if file in ("1", "nowhere") else tmp_path / file}
    status, out, errors = run("eval.py", *flags, *(part for pair in given.items() for part in pair), cwd=root)
    assert status == 2 and errors.startswith("eval.py: error: ") and said in errors and errors.count("\n") == 1, errors


def test_statistics_without_inception_and_half_a_clip_are_refused(toy_run, tmp_path, clip_folder):
    from transformers import CLIPTextModel
    root, flags = toy_run
    status, _, errors = run("eval.py", *flags, "--reference", "some.npz", cwd=root)
    assert status == 2 and "add --inception FILE" in errors and errors.count("\n") == 1
    half = tmp_path / "half"
    CLIPTextModel.from_pretrained(clip_folder).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((common.Path(clip_folder) / name).read_bytes())
    status, _, errors = run("eval.py", *flags, "--clip-model", half, cwd=root)
    assert status == 2 and "--clip-model" in errors and errors.count("\n") == 1, errors
