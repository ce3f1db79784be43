"""The tiny captioner and the tiny segmenter: what they learn from, how they are saved, how they are measured."""
import random

import numpy as np
import pytest
import torch
import transformers

import toy
from common import batches
from toy import experts, shapes, tellings
from toy.shapes import OPPOSITE, Group, Scene


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shapes.build(tmp_path_factory.mktemp("experts") / "world", train=64, val=32)


def scenes_of(world, split="val"):
    return [Scene.from_json(image["scene"]) for _, _, image in experts.CaptionedImages(world, split, 24).items]


def test_each_caption_says_the_scene_that_it_was_made_of():
    rng = random.Random(0)
    for i in range(500):
        scene = shapes.random_scene(rng, unseen=i % 2 == 1)
        same = {scene, Scene(scene.groups[::-1], OPPOSITE[scene.relation])} if scene.relation else {scene}
        for text in (*shapes.captions(scene, rng), tellings.plain(scene)):
            assert shapes.scene_of(text) in same, text
    assert shapes.scene_of("above a violet square are 3 discs") is None                   # no colour
    for text in ("", "a red circle above", "five red circles", "a red circle above a blue square above a green circle", "ein roter Kreis"):
        assert shapes.scene_of(text) is None


def test_label_maps_are_what_is_drawn():
    rng, images, notes, drawn = random.Random(1), [], [], []
    names = [f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES]
    for i in range(100):
        things = shapes.layout(shapes.random_scene(rng), rng)
        images.append({"id": 7 * i, "width": 24, "height": 24})
        notes += [{"image_id": 7 * i, "category_id": 100 - names.index(f"{thing.colour} {thing.shape}"),
                   "segmentation": [[24 * v for v in shapes.outline(thing)]]} for thing in things]
        picture = np.full((24, 24), 0)
        for thing in things:                                                              # half-covered pixels are the object's
            contrast = abs(np.array(shapes.COLOURS[thing.colour]) - 242).sum()            # 242: the background that render() takes
            covered = abs(shapes.render([thing]).astype(int) - 242).sum(-1) > contrast / 2
            picture[covered] = 1 + names.index(f"{thing.colour} {thing.shape}")
        drawn.append(picture)
    maps = experts.label_maps({"images": images, "annotations": notes, "categories": [{"id": 100 - i, "name": n} for i, n in enumerate(names)]})
    found = np.stack([maps[image["id"]] for image in images])
    assert found.dtype == np.uint8 and np.mean(found != np.stack(drawn)) < 0.01
    assert all(set(np.unique(a)) == set(np.unique(b)) for a, b in zip(found, drawn))


def test_pictures_come_with_their_own_label_map(world):
    dataset, plain = experts.LabelledImages(world, "train", 24), experts.CaptionedImages(world, "train", 24)
    assert dataset.names[0] == "background" and len(dataset.names) == 16 and dataset.names[1] == "red circle"
    pictures, texts, _ = next(iter(batches(dataset, 8, 0, 1, 0)))
    same, same_texts, _ = next(iter(batches(plain, 8, 0, 1, 0)))
    assert pictures.shape == (8, 4, 24, 24) and torch.equal(pictures[:, :3], same) and texts == same_texts
    for labels, text in zip(pictures[:, 3], texts):
        assert {dataset.names[i] for i in labels.unique() if i} == {f"{g.colour} {g.shape}" for g in shapes.scene_of(text).groups}


def test_spoilt_pictures_keep_their_shape_and_their_mean():
    torch.manual_seed(0)
    pictures = torch.rand(64, 3, 24, 24)
    worse = experts.spoilt(pictures)
    assert worse.shape == pictures.shape and not torch.equal(worse, pictures)
    assert (worse.mean((1, 2, 3)) - pictures.mean((1, 2, 3))).abs().max() < 0.02


@pytest.mark.parametrize("name", ["captioner", "segmenter"])
def test_an_expert_is_trained_once_and_loaded_by_the_classes_of_the_real_one(world, tmp_path, monkeypatch, name):
    losses, train = [], experts.train

    def listen(model, optimizers, stream, steps, label, loss_of, **more):
        def listened(item):
            losses.append(loss_of(item))
            return losses[-1]
        train(model, optimizers, stream, steps, label, listened, **more)
    monkeypatch.setattr(experts, "train", listen)
    build, accuracy = getattr(experts, name), getattr(experts, f"{name}_accuracy")
    folder = build(world, tmp_path / name, steps=16, batch=16)
    assert len(losses) == 16 and torch.stack(losses[-3:]).mean() < 0.8 * torch.stack(losses[:3]).mean()
    assert build(world, tmp_path / name) == folder and len(losses) == 16
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert all(0 <= value <= 100 for value in accuracy(folder, world, samples=16).values())


def test_the_captioner_runs_as_blip_2_does(world, tmp_path):
    folder = experts.captioner(world, tmp_path / "captioner", steps=1, batch=2)
    model, processor = transformers.AutoModelForImageTextToText.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)
    dataset = experts.CaptionedImages(world, "val", 24)
    pictures = [experts.Image.open(path) for path, _, _ in dataset.items[:3]]
    inputs = processor(images=pictures, return_tensors="pt")
    pixels = torch.stack([dataset.picture(i) for i in range(3)]) / 255
    torch.testing.assert_close(inputs["pixel_values"], (pixels - experts.MEAN) / experts.STD)
    texts = processor.batch_decode(model.generate(**inputs, max_new_tokens=30), skip_special_tokens=True)
    assert len(texts) == 3 and not any("<|" in text for text in texts)


def test_the_segmenter_names_its_labels(world, tmp_path):
    folder = experts.segmenter(world, tmp_path / "segmenter", steps=1, batch=2)
    model, processor = (kind.from_pretrained(folder) for kind in (transformers.AutoModelForSemanticSegmentation, transformers.AutoImageProcessor))
    assert [model.config.id2label[i] for i in range(16)] == experts.LabelledImages(world, "val", 24).names
    inputs = processor(images=[experts.Image.new("RGB", (24, 24))] * 2, return_tensors="pt")
    maps = processor.post_process_semantic_segmentation(model.eval()(**inputs), target_sizes=[(24, 24)] * 2)
    assert [labels.shape for labels in maps] == [(24, 24)] * 2


@pytest.mark.parametrize("name", ["captioner", "segmenter"])
@pytest.mark.parametrize("last", [experts, experts.os])
def test_an_interrupted_build_leaves_nothing(world, tmp_path, monkeypatch, name, last):
    def fail(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(last, "train" if last is experts else "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        getattr(experts, name)(world, tmp_path / name, steps=1, batch=2)
    assert list(tmp_path.iterdir()) == []


def pretend(monkeypatch, kind, processor, model):
    """Lets the auto classes of transformers load these in the place of an expert."""
    for name, part in ((kind, model), ("AutoProcessor", processor), ("AutoImageProcessor", processor)):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda _, part=part: part)


def captions_score(world, monkeypatch, said):
    """captioner_accuracy of a captioner that says these texts."""
    class Processor:
        def __call__(self, images, return_tensors):
            return {}

        def batch_decode(self, numbers, skip_special_tokens):
            return said
    model = torch.nn.Identity()
    model.generate = lambda max_new_tokens: None
    pretend(monkeypatch, "AutoModelForImageTextToText", Processor(), model)
    return experts.captioner_accuracy(data=world, samples=len(said))


def test_captions_are_right_in_any_wording_and_wrong_in_the_field_that_they_miss(world, monkeypatch):
    rng, scenes = random.Random(0), scenes_of(world)
    assert set(captions_score(world, monkeypatch, [f" {shapes.sentence(scene, rng)}\n" for scene in scenes]).values()) == {100}
    for field in ("count", "colour", "shape"):
        table = captions_score(world, monkeypatch, [shapes.keywords(shapes.change_field(scene, field, rng)) for scene in scenes])
        assert table[field] < 10 and table["all"] < 10, field
    two = [shapes.change_field(scene, "relation", rng) if scene.relation else Scene((Group(1, "red", "circle"),)) for scene in scenes]
    assert captions_score(world, monkeypatch, [shapes.keywords(scene) for scene in two])["all"] < 10
    for text in ("a dog on a horse", "four red circles above four blue squares"):                 # the second has no room in a picture
        assert captions_score(world, monkeypatch, [text] * len(scenes))["all"] == 0


def test_segments_are_counted_by_label(world, monkeypatch):
    dataset = experts.LabelledImages(world, "val", 24)
    true = torch.stack([dataset.picture(i)[3] for i in range(32)]).long()

    def score(found):
        class Processor:
            def __call__(self, images, return_tensors):
                return {}

            def post_process_semantic_segmentation(self, outputs, target_sizes):
                return list(found)
        pretend(monkeypatch, "AutoModelForSemanticSegmentation", Processor(), torch.nn.Sequential())
        return experts.segmenter_accuracy(data=world, samples=32)
    monkeypatch.setattr(torch.nn.Sequential, "forward", lambda self, **_: None)
    assert set(score(true).values()) == {100}
    other = score(torch.where(true > 0, true % 15 + 1, 0))                                # each object another colour or shape
    assert other["objects"] == other["pictures"] == 0 and other["iou"] < 20
    specks = true.clone()
    specks[:, 0, 0] = 3                                                                   # too small to be an object
    assert score(specks)["pictures"] > 90 and score(specks)["objects"] == 100
    half = torch.where(torch.arange(32).view(-1, 1, 1) < 16, true, 0)
    assert score(half)["pictures"] == 50


def test_only_what_is_named_is_built(monkeypatch):
    built = []
    monkeypatch.setattr(shapes, "build", lambda *_: "data/shapes")
    for name in ("clip", "llm", "captioner", "segmenter"):
        monkeypatch.setattr(experts, name, lambda data, name=name: built.append(name))
    toy.prepare("shapes", "openai/clip-vit-large-patch14")
    assert built == []
    toy.prepare("shapes", "runs/toy/clip", captioner="Salesforce/blip2-opt-2.7b", segmenter="runs/toy/segmenter")
    assert built == ["clip", "segmenter"]
    toy.prepare("coco", "openai/clip-vit-large-patch14", captioner="runs/toy/captioner")
    assert built == ["clip", "segmenter", "captioner"]
