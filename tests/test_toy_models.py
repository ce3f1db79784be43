"""The small models: what they learn from, and that the classes of the real ones load them."""
import random

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
import toy
from encoders import ClipScorer
from image_data import CaptionedImages, batches
from toy import language, models, shapes


def test_the_tokenizer_encodes_any_text_between_start_and_end():
    tokenizer = models.train_tokenizer(["two red circles"] * 5, vocabulary=300, length=16)
    for text in ("two red circles", "三个绿色", "\N{GRINNING FACE}"):
        ids = tokenizer(text).input_ids
        assert ids[0] == 2 and ids[-1] == 3 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer("red circles " * 20, truncation=True).input_ids) == 16


def test_batches_hold_each_line_once_and_are_not_too_large():
    lines = [[i] * (1 + i % 20) for i in range(4096)]
    seen = []
    for batch in models.token_batches(iter(lines), 100, random.Random(0)):
        assert len(batch) * max(map(len, batch)) <= 100
        seen += batch
        if len(seen) > 4096 - 100:
            break
    assert len({line[0] for line in seen}) == len(seen)
    lengths = [len(line) for line in seen[:1000]]
    assert lengths != sorted(lengths)                                       # in random order


def test_a_pixel_has_the_label_of_the_polygon_that_holds_its_centre(toy_data):
    polygon = [1, 1, 3.4, 1, 3.4, 2.4, 1, 2.4]
    labels = models.label_map([{"category_id": 2, "segmentation": [polygon]}], size=4)
    assert labels.tolist() == [[0, 0, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    dataset = models.LabelledImages(toy_data, "train", 24)
    assert dataset.names[:2] == ["background", "red circle"] and len(dataset.names) == 16
    images, _ = next(iter(batches(dataset, 32, 0, 1, 0)))                   # (32, 4, 24, 24)
    labels = images[:, 3].numpy()
    colours = np.array([(242, 242, 242), *np.repeat(list(shapes.COLOURS.values()), 3, axis=0)])
    distance = np.abs(images[:, :3].permute(0, 2, 3, 1).numpy() - colours[labels]).max(-1)
    assert (distance < 20).mean() > 0.85                                    # all but the borders


# ---------------------------------------------------------------------------------------- training
STEPS = {"clip": 60, "llm": 16, "captioner": 12, "segmenter": 12}


def train(name, data, folder):
    size = {"tokens": 400} if name == "llm" else {"batch_size": 16}
    return getattr(models, name)(data, folder, steps=STEPS[name], **size)


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory):
    """The folder of all models, each trained for some steps, and the losses."""
    folder = tmp_path_factory.mktemp("models")
    losses = {name: [] for name in STEPS}
    update = models.Trainer.update
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            def listen(self, loss, name=name):
                losses[name].append(loss.item())
                update(self, loss)
            patch.setattr(models.Trainer, "update", listen)
            assert train(name, toy_data, folder / name) == folder / name
    assert {path.name for path in folder.iterdir()} == set(STEPS)
    return folder, losses


@pytest.mark.parametrize("name", STEPS)
def test_the_loss_falls_and_a_model_is_trained_once(trained, toy_data, monkeypatch, name):
    folder, losses = trained
    assert len(losses[name]) == STEPS[name]
    assert min(losses[name][-4:]) < 0.9 * losses[name][0]
    if name in ("clip", "segmenter"):                     # a guess among 16 captions, or 16 labels
        assert losses[name][0] == pytest.approx(np.log(16), abs=0.5)
    monkeypatch.setattr(models, "new_model", None)
    assert train(name, toy_data, folder / name) == folder / name


def test_the_instructed_llm_goes_on_from_the_llm(trained, toy_data, tmp_path, monkeypatch):
    read = []
    line_of = language.instructed_line
    monkeypatch.setattr(language, "instructed_line", lambda *a: read.append(1) or line_of(*a))
    llm = trained[0] / "llm"
    folder = models.instructed_llm(toy_data, tmp_path / "new", llm, steps=4, tokens=400)
    assert read and (folder / "tokenizer.json").read_text() == (llm / "tokenizer.json").read_text()
    before, after = (load_file(path / "model.safetensors") for path in (llm, folder))
    moved = torch.cat([(after[name] - before[name]).flatten().abs() for name in before])
    size = torch.cat([before[name].flatten().abs() for name in before])
    assert 0 < moved.mean() < 0.3 * size.mean()


@torch.no_grad()
def test_captioner_and_segmenter_run_as_the_real_ones_do(trained, toy_data):
    dataset = models.LabelledImages(toy_data, "val", 24)
    images = [dataset.image(i)[:3] for i in range(3)]
    pixels = models.normalise(torch.stack(images) / 255)
    captioner = transformers.AutoModelForImageTextToText.from_pretrained(trained[0] / "captioner")
    processor = transformers.AutoProcessor.from_pretrained(trained[0] / "captioner")
    inputs = processor(images=images, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], pixels)
    ids = captioner.generate(**inputs, max_new_tokens=20)
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    assert len(texts) == 3 and not any("<|" in text for text in texts)

    folder = trained[0] / "segmenter"
    segmenter = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert [segmenter.config.id2label[i] for i in range(16)] == dataset.names
    inputs = processor(images=images, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], pixels)
    outputs = segmenter(**inputs)
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(24, 24)] * 3)
    assert [labels.shape for labels in maps] == [(24, 24)] * 3


@torch.no_grad()
def test_clip_pools_at_the_end_of_a_text(trained):
    clip = transformers.CLIPModel.from_pretrained(trained[0] / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained[0] / "clip")
    tokens = tokenizer(["a red circle", "a red circle above a blue square"], padding=True,
                       return_tensors="pt")
    outputs = clip.text_model(**tokens)
    end = tokens.input_ids[0].tolist().index(3)
    torch.testing.assert_close(outputs.pooler_output[0], outputs.last_hidden_state[0, end])


@torch.no_grad()
def test_the_quality_scorer_is_a_line_through_clips_features(trained, tmp_path, capsys):
    data = shapes.build_quality(shapes.build(tmp_path / "world", train=2, val=2), count=300)
    head = load_file(models.scorer(data, trained[0] / "clip", tmp_path / "quality.safetensors"))
    assert "rank correlation" in capsys.readouterr().out
    dataset = CaptionedImages(data, "quality", 24)
    images = torch.stack([dataset.image(i) for i in range(30, 300)]).permute(0, 2, 3, 1)
    found = ClipScorer(trained[0] / "clip").images(images) @ head["weight"][0] + head["bias"]
    quality = torch.tensor([image["quality"] for _, _, image in dataset.items[30:]])
    assert found.mean() == pytest.approx(quality.mean().item(), abs=1e-3)
    assert (found - quality).var() < 0.9 * quality.var()


@pytest.mark.parametrize("data, clip, others, expected", [
    ("shapes", "openai/clip-vit-large-patch14", {}, ""),
    ("shapes", "runs/toy/clip", {"segmenter": "runs/toy/segmenter"}, "clip segmenter"),
    ("shapes", "runs/toy/clip", {"llm": "Qwen/Qwen2.5-1.5B"},
     "clip build_parallel build_narratives build_quality scorer"),
    ("shapes", "runs/toy/clip", {"llm": "runs/toy/llm_instructed"},
     "clip instructed_llm build_parallel build_narratives build_quality scorer"),
    ("simple", "words", {}, ""),
    ("coco", "runs/toy/clip", {"captioner": "runs/toy/captioner"}, "clip captioner"),
])
def test_only_what_is_named_is_built(
        monkeypatch, tmp_path, capsys, data, clip, others, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    built = []
    monkeypatch.setattr(shapes, "build", lambda folder="data/shapes", *_, **more: folder)
    for module, names in ((language, ("build_parallel", "build_narratives")),
                          (shapes, ("build_quality",)),
                          (models, (*STEPS, "instructed_llm", "scorer"))):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, name=name: built.append(name))
    folder = {"shapes": "data/shapes", "simple": "data/simple24"}.get(data, data)
    assert toy.prepare(data, clip, **others) == folder
    assert built == expected.split()
    assert ("only captions of coloured shapes" in capsys.readouterr().out) == (data == "coco")
    built.clear()
    with pytest.raises(common.UserError, match="--data nowhere: there is no such folder"):
        toy.prepare("nowhere", clip, **others)
    assert not built
