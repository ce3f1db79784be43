"""The toy world's scenes: what they say, how they look, and that on disk they are MS-COCO's."""
import json
import random
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from image_data import CaptionedImages
from toy import shapes
from toy.shapes import COLOURS, FIELDS, RELATIONS, SHAPES, Group, Scene, Thing

SCENE = Scene((Group(3, "green", "circle"), Group(1, "blue", "square")), "above")


def test_one_triple_in_eight_is_held_out_and_every_pair_is_seen():
    triples = [Group(*triple) for triple in product(range(1, 5), COLOURS, SHAPES)]
    seen = [group for group in triples if not shapes.held_out(group)]
    assert len(triples) - len(seen) in (7, 8)
    assert len({(group.count, group.colour) for group in seen}) == 4 * 5
    assert len({(group.count, group.shape) for group in seen}) == 4 * 3
    assert len({(group.colour, group.shape) for group in seen}) == 5 * 3


@pytest.mark.parametrize("unseen", [False, True])
def test_random_scenes_are_as_promised(unseen):
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng, unseen) for _ in range(3000)]
    for scene in scenes:
        counts = [group.count for group in scene.groups]
        assert 1 <= counts[0] <= 4 and sum(counts) <= 5
        assert len(counts) == 1 or counts[1] <= 2
        assert len({(group.colour, group.shape) for group in scene.groups}) == len(counts)
        assert (scene.relation in RELATIONS) == (len(counts) == 2)
        assert any(map(shapes.held_out, scene.groups)) == scene.unseen == unseen
    assert 0.6 < np.mean([len(scene.groups) == 2 for scene in scenes]) < 0.8
    simple = [shapes.random_scene(rng, unseen, simple=True) for _ in range(300)]
    assert all(len(scene.groups) == 1 and scene.unseen == unseen for scene in simple)


@pytest.mark.parametrize("field", FIELDS)
def test_change_field_changes_that_field_alone(field):
    rng = random.Random(1)
    for scene in [shapes.random_scene(rng) for _ in range(500)]:
        if field == "relation" and not scene.relation:
            continue
        changed = shapes.change_field(scene, field, rng)
        assert shapes.is_possible(changed)
        assert (changed.relation != scene.relation) == (field == "relation")
        different = {name for a, b in zip(scene.groups, changed.groups)
                     for name in FIELDS[:3] if getattr(a, name) != getattr(b, name)}
        assert different == {field} - {"relation"}


def test_captions_are_four_sentences_and_one_keyword_prompt():
    assert shapes.keywords(SCENE) == "green, circle, x3, above, blue, square"
    texts = [text for seed in range(300) for text in shapes.captions(SCENE, random.Random(seed))]
    assert len(texts) == 5 * 300 and texts[4::5] == 300 * [shapes.keywords(SCENE)]
    assert {"three green circles above a blue square",
            "a picture of a blue square below 3 green circles",
            "an image of one blue square under three green discs",
            "on top of a single blue square are three green discs"} <= set(texts)
    for text in set(texts) - {shapes.keywords(SCENE)}:
        turned_round = any(word in text for word in shapes.PREPOSITIONS["below"])
        place_first = text.startswith(shapes.PREPOSITIONS["above"])
        assert (text.find("green") > text.find("blue")) == (turned_round or place_first), text


def test_a_layout_has_its_relation_and_no_other():
    rng = random.Random(2)
    for scene in [shapes.random_scene(rng) for _ in range(500)]:
        things = shapes.layout(scene, rng)
        assert [(t.colour, t.shape) for t in things] == [
            (group.colour, group.shape) for group in scene.groups for _ in range(group.count)]
        for i, a in enumerate(things):
            assert a.radius < min(a.x, a.y) and max(a.x, a.y) < 1 - a.radius     # inside the image
            for b in things[:i]:                                                 # a pixel apart
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + 1 / 24
        if scene.relation:
            first, second = things[:scene.groups[0].count], things[scene.groups[0].count:]
            gaps = {"above": min(t.y for t in second) - max(t.y for t in first),
                    "below": min(t.y for t in first) - max(t.y for t in second),
                    "left of": min(t.x for t in second) - max(t.x for t in first),
                    "right of": min(t.x for t in first) - max(t.x for t in second)}
            assert [name for name, gap in gaps.items() if gap > 0.12] == [scene.relation]


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_and_outline_agree(shape):
    area = shapes.AREA[shape] * 0.3**2
    thing = Thing("red", shape, 0.52, 0.47, 0.3)
    drawn = shapes.coverage(thing, size=200)
    assert drawn.mean() == pytest.approx(area, rel=0.01)
    annotation = shapes.annotation(thing, size=1000)
    assert annotation["area"] == pytest.approx(area * 1e6)
    x, y = np.array(annotation["segmentation"]).reshape(-1, 2).T / 1000
    polygon = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
    assert polygon == pytest.approx(area, rel=0.02)                    # the circle has 24 corners
    rows, columns = np.nonzero(drawn > 0.5)
    assert columns.mean() / 200 == pytest.approx(0.52, abs=0.01)
    below_centre = rows.mean() / 200 - 0.47
    assert below_centre == pytest.approx(0.1 if shape == "triangle" else 0, abs=0.01)    # apex up


def test_an_image_mixes_background_and_colour_by_coverage():
    red = Thing("red", "square", 0.55, 0.5, 0.2 / shapes.SQUARE)       # from 0.35 to 0.75
    image = shapes.render([red], size=10)
    assert (image[3:7, 4:7] == COLOURS["red"]).all()
    assert (image[3:7, [3, 7]] == [228, 145, 143]).all()               # half of it, half of 242
    image[3:7, 3:8] = 242
    assert (image == 242).all()
    assert (shapes.render([], 24, random.Random(0)) != 242).any()      # colours vary


def degrade(image, things, ragged=0.0, blur=0.0, noise=0.0, pale=0.0):
    numbers = iter([ragged, 0, blur, 0, noise, 0, 1, pale])          # 0: it happens
    rng = SimpleNamespace(random=lambda: next(numbers), getrandbits=lambda _: 0)
    degraded, quality = shapes.degrade(image, things, rng)
    return degraded.astype(float), quality


def test_degraded_images_are_worth_less():
    things = shapes.layout(SCENE, random.Random(3))
    image = shapes.render(things)
    clean = image.astype(float)
    same, quality = degrade(image, things)
    assert (same == clean).all() and quality == 0.8
    pale, quality = degrade(image, things, pale=0.5)
    np.testing.assert_allclose(pale, 0.7 * clean + 0.3 * 245, atol=0.51)
    assert quality == 0.5
    blurred, quality = degrade(image, things, blur=1.0)
    around = sum(np.roll(clean, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    inner = np.s_[1:-1, 1:-1]
    np.testing.assert_allclose(blurred[inner], (0.3 * clean + 0.7 * around)[inner], atol=0.51)
    assert quality == 0.16
    assert 9 < degrade(np.full_like(image, 128), things, noise=0.5)[0].std() < 11
    ragged, _ = degrade(image, things, ragged=1.0)
    lost = (ragged != clean).any(-1)
    assert (ragged[lost] == 242).all() and 10 < lost.sum() < 60      # pixels of a border


def test_the_data_set_is_read_like_coco(toy_data):
    dataset = CaptionedImages(toy_data, "val", 24)
    assert len(dataset) == 64 and dataset.image(0).shape == (3, 24, 24)
    scenes = [Scene.from_json(image["scene"]) for _, _, image in dataset.items]
    assert [scene.unseen for scene in scenes] == 32 * [False, True]
    for (_, captions, _), scene in zip(dataset.items, scenes):
        assert len(captions) == 5 and captions[4] == shapes.keywords(scene)
    train = CaptionedImages(toy_data, "train", 24)
    assert not any(Scene.from_json(image["scene"]).unseen for _, _, image in train.items)


def test_each_object_has_a_labelled_box(toy_data):
    content = json.loads((toy_data / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = CaptionedImages(toy_data, "val", 24)
    groups = [(i, group) for i, image in enumerate(content["images"])
              for group in Scene.from_json(image["scene"]).groups for _ in range(group.count)]
    assert len(content["annotations"]) == len(groups)
    for thing, (i, group) in zip(content["annotations"], groups):
        assert thing["image_id"] == i
        assert names[thing["category_id"]] == f"{group.colour} {group.shape}"
        x, y, width, height = thing["bbox"]
        polygon = np.array(thing["segmentation"][0]).reshape(-1, 2)
        np.testing.assert_allclose([x, y], polygon.min(0), atol=0.01)
        np.testing.assert_allclose([x + width, y + height], polygon.max(0), atol=0.02)
        centre = images.image(i)[:, int(y + height / 2), int(x + width / 2)].int().numpy()
        assert np.abs(centre - COLOURS[group.colour]).max() <= 9


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(shapes, "captions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shapes.build(tmp_path / "world", train=5, val=5)
    assert list(tmp_path.iterdir()) == []
