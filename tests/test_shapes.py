"""The toy world: the judge is exact, the held-out triples are held out, the files are COCO's."""
import json
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from toy import shapes
from toy.shapes import COLOURS, FIELDS, SHAPES, Group, Scene, Thing


@pytest.fixture(scope="module")
def world():
    """5 000 scenes, drawn, blurred by half a pixel, with noise of sigma 0.05 (pixels in [-1, 1]), and parsed."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    scenes = [shapes.random_scene(rng, unseen=i % 2 == 1) for i in range(5000)]
    drawn = [Image.fromarray(shapes.render(shapes.layout(scene, rng), 24, rng)).filter(ImageFilter.GaussianBlur(0.5)) for scene in scenes]
    pictures = np.stack([np.asarray(picture, float) for picture in drawn])
    return scenes, shapes.parse(np.clip(pictures + noise.normal(0, 0.05 * 127.5, pictures.shape), 0, 255))


def test_judge_accepts_right_pictures(world):
    scenes, parsed = world
    verdicts = [shapes.judge(things, scene) for things, scene in zip(parsed, scenes)]
    for field in FIELDS:
        assert np.mean([verdict[field] for verdict in verdicts]) >= 0.995, field


@pytest.mark.parametrize("field", FIELDS[:4])
def test_judge_rejects_pictures_with_one_field_changed(world, field):
    rng = random.Random(1)
    pairs = [(things, shapes.change_field(scene, field, rng)) for scene, things in zip(*world) if field != "relation" or scene.relation]
    verdicts = [shapes.judge(things, scene) for things, scene in pairs]
    assert np.mean([not verdict["all"] for verdict in verdicts]) >= 0.995
    assert np.mean([not verdict[field] for verdict in verdicts]) >= 0.98          # and it is that field that is blamed


def test_judge_reads_other_sizes():
    rng = random.Random(2)
    scenes = [shapes.random_scene(rng) for _ in range(200)]
    parsed = shapes.parse(np.stack([shapes.render(shapes.layout(scene, rng), 64, rng) for scene in scenes]))
    assert np.mean([shapes.judge(things, scene)["all"] for things, scene in zip(parsed, scenes)]) >= 0.995


def test_empty_and_noisy_pictures_are_judged_wrong():
    scene = Scene((Group(1, "red", "circle"),))
    noise = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3))
    for things in shapes.parse(np.concatenate([np.full((1, 24, 24, 3), 240), noise])):
        assert not shapes.judge(things, scene)["all"]


def test_relation_needs_every_object_on_its_side():
    scene = Scene((Group(2, "red", "circle"), Group(1, "blue", "square")), "above")
    low = [Thing("red", "circle", 0.2, 0.2, 0.1), Thing("red", "circle", 0.5, 0.8, 0.1), Thing("blue", "square", 0.5, 0.5, 0.1)]
    verdict = shapes.judge(low, scene)
    assert verdict == {"count": True, "colour": True, "shape": True, "relation": False, "all": False}


def test_a_missing_group_makes_colour_and_shape_wrong():
    scene = Scene((Group(1, "red", "circle"), Group(1, "blue", "square")), "above")
    assert not any(shapes.judge([Thing("red", "circle", 0.5, 0.2, 0.1)], scene)[field] for field in FIELDS)


def test_one_triple_in_eight_is_held_out_and_each_pair_is_seen():
    triples = [Group(n, colour, shape) for n in range(1, 5) for colour in COLOURS for shape in SHAPES]
    assert sum(map(shapes.held_out, triples)) in (7, 8)
    seen = [g for g in triples if not shapes.held_out(g)]
    assert len({(g.count, g.colour) for g in seen}) == 20 and len({(g.count, g.shape) for g in seen}) == 12
    assert len({(g.colour, g.shape) for g in seen}) == 15
    rng = random.Random(3)
    assert not any(shapes.held_out(g) for _ in range(2000) for g in shapes.random_scene(rng).groups)
    assert all(any(map(shapes.held_out, shapes.random_scene(rng, unseen=True).groups)) for _ in range(200))


def test_scenes_have_the_promised_make_up():
    rng = random.Random(4)
    scenes = [shapes.random_scene(rng) for _ in range(4000)]
    for scene in scenes:
        assert 1 <= scene.groups[0].count <= 4 and sum(g.count for g in scene.groups) <= 5
        assert len(scene.groups) == 1 or scene.groups[1].count <= 2
    assert 0.6 < np.mean([len(scene.groups) == 2 for scene in scenes]) < 0.8


def test_written_world_is_coco_and_tells_each_picture_five_times(tmp_path):
    from pathlib import Path
    folder = shapes.build(tmp_path / "world", train=20, val=10)
    notes = json.loads((folder / "annotations" / "captions_val2017.json").read_text())
    instances = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    assert len(notes["annotations"]) == 5 * len(notes["images"]) == 50
    assert sum(image["unseen"] for image in notes["images"]) == 5
    for image in notes["images"]:
        assert (Path(folder) / "val2017" / image["file_name"]).exists()
        scene = Scene.from_json(image["scene"])
        assert sum(i["image_id"] == image["id"] for i in instances["annotations"]) == sum(g.count for g in scene.groups)
    for instance in instances["annotations"]:
        x, y, w, h = instance["bbox"]
        assert -0.01 <= x and -0.01 <= y and x + w <= 24.01 and y + h <= 24.01 and len(instance["segmentation"][0]) >= 6


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(shapes, "captions", fail)
    with pytest.raises(KeyboardInterrupt):
        shapes.build(tmp_path / "world", train=5, val=5)
    assert list(tmp_path.iterdir()) == []
