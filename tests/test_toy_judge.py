"""The judge: exact on noisy scenes, and right about what is wrong."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from common import UserError
from toy import judge, shapes
from toy.judge import ROWS
from toy.shapes import FIELDS, Group, Scene, Thing

TWO_AND_TWO = Scene((Group(2, "red", "circle"), Group(2, "blue", "square")), "above")


def things(text):
    """'red circle 2 1, blue square 2 5' -> things at (0.2, 0.1) and (0.2, 0.5)."""
    words = [part.split() for part in text.split(", ")]
    return [Thing(colour, shape, int(x) / 10, int(y) / 10, 0.12) for colour, shape, x, y in words]


def wrong(text, scene):
    """The fields that the judge finds wrong."""
    verdict = judge.judge(things(text), scene)
    assert set(verdict) == {*FIELDS, "all"}
    assert verdict["all"] == all(verdict[field] for field in FIELDS)
    return {field for field in FIELDS if not verdict[field]}


def noisy_images(layouts):
    """Drawn, blurred by half a pixel, with noise of sigma 0.05 (of pixels in [-1, 1])."""
    rng = random.Random(1)
    images = []
    for layout in layouts:
        image = Image.fromarray(shapes.render(layout, 24, rng))
        images.append(np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), np.float32))
    noise = np.random.default_rng(0).normal(0, 0.05 * 127.5, (len(images), 24, 24, 3))
    return np.clip(np.stack(images) + noise, 0, 255).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    """5 000 scenes, and what the judge sees in a noisy image of each."""
    rng = random.Random(0)
    scenes = [shapes.random_scene(rng, unseen=i % 2 == 1) for i in range(5000)]
    return scenes, judge.parse(noisy_images([shapes.layout(scene, rng) for scene in scenes]))


# ----------------------------------------------------------------------------------- noisy scenes
def test_right_images_are_judged_right(world):
    verdicts = [judge.judge(found, scene) for scene, found in zip(*world)]
    for field in (*FIELDS, "all"):
        assert np.mean([verdict[field] for verdict in verdicts]) >= 0.995, field


@pytest.mark.parametrize("field", FIELDS)
def test_images_with_one_field_changed_are_judged_wrong_in_that_field(world, field):
    rng = random.Random(1)
    verdicts = []
    for scene, found in zip(*world):
        if scene.relation or field != "relation":
            verdicts.append(judge.judge(found, shapes.change_field(scene, field, rng)))
    assert np.mean([not verdict["all"] for verdict in verdicts]) >= 0.995
    assert np.mean([not verdict[field] for verdict in verdicts]) >= 0.98


# ------------------------------------------------------------------------------------- the verdict
def test_two_and_two_is_right_in_either_place():
    text = "red circle 2 1, red circle 6 2, blue square 2 5, blue square 7 8"
    assert wrong(text, TWO_AND_TWO) == set()
    assert wrong(text, Scene(TWO_AND_TWO.groups[::-1], "below")) == set()


def test_one_and_three_for_two_and_two_is_a_wrong_count():
    text = "red circle 2 1, blue square 2 5, blue square 7 8, blue square 5 5"
    assert wrong(text, TWO_AND_TWO) == {"count"}


@pytest.mark.parametrize("text, fields", [
    ("red circle 2 1, red circle 6 2, blue square 2 5", {"count"}),
    ("red circle 2 1, red circle 6 2, blue square 2 5, blue square 7 8, blue square 5 8",
     {"count"}),
    ("red circle 2 1, green circle 6 2, blue square 2 5, blue square 7 8", {"colour"}),
    ("red circle 2 1, red circle 6 2, blue square 2 5, blue triangle 7 8", {"shape"}),
    ("red circle 2 1, red circle 6 8, blue square 2 5, blue square 7 8", {"relation"}),
    ("red circle 2 8, red circle 6 8, blue square 2 5, blue square 7 1", {"relation"}),
    ("red circle 1 2, red circle 2 6, blue square 5 2, blue square 8 7", {"relation"}),
    ("red circle 2 4, red circle 6 4, blue square 2 5, blue square 7 8", {"relation"}),   # too near
])
def test_a_fault_is_found_in_its_field(text, fields):
    assert wrong(text, TWO_AND_TWO) == fields


def test_a_missing_group_is_wrong_in_every_field():
    scene = Scene((Group(1, "red", "circle"), Group(1, "blue", "square")), "above")
    assert wrong("red circle 5 2", scene) == set(FIELDS)


def test_colour_and_shape_say_which_object_belongs_to_which_group():
    scene = Scene((Group(1, "red", "circle"), Group(2, "blue", "circle")), "below")
    assert wrong("blue circle 2 2, blue circle 6 2, red circle 4 7", scene) == set()
    assert wrong("blue circle 4 2, red circle 2 7, red circle 6 7", scene) == {"count"}


def test_a_scene_of_one_group_has_no_relation_to_get_wrong():
    scene = Scene((Group(2, "red", "circle"),))
    assert wrong("red circle 2 2, red circle 7 7", scene) == set()
    assert wrong("red circle 2 2, blue square 7 7", scene) == {"colour", "shape"}
    assert wrong("red circle 2 2", scene) == {"count"}


def test_without_objects_or_with_more_than_ten_nothing_is_right():
    scene = Scene((Group(1, "red", "circle"),))
    crowd = [Thing("red", "circle", i / 11, 0.5, 0.02) for i in range(11)]
    for found in ([], crowd):
        assert judge.judge(found, scene) == dict.fromkeys((*FIELDS, "all"), False)
    assert judge.judge(crowd[:10], scene)["colour"], "ten objects are judged"


def test_empty_and_noisy_images_are_judged_wrong():
    noise = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3))
    for found in judge.parse(np.concatenate([np.full((1, 24, 24, 3), 240), noise])):
        assert not judge.judge(found, Scene((Group(1, "red", "circle"),)))["all"]


# ------------------------------------------------------------------------------------- the objects
def test_components_are_connected_by_four_neighbours_of_one_label():
    labels = np.array([[1, 1, 0, 2],
                       [0, 1, 2, 2],
                       [1, 0, 0, 0],
                       [3, 3, 1, 1]])
    true = np.array([[1, 1, 0, 2],
                     [0, 1, 2, 2],
                     [3, 0, 0, 0],
                     [4, 4, 5, 5]])
    snake = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    parts = judge.components(np.stack([labels, snake]))
    pairs = set(zip(parts[0].flat, true.flat))               # one number for each part
    assert len(pairs) == 6 and len({a for a, _ in pairs}) == 6 and (0, 0) in pairs
    assert len(np.unique(parts[1])) == 2


@pytest.mark.parametrize("size", [24, 64])
def test_parse_finds_place_and_radius(size):
    rng = random.Random(2)
    for scene in [shapes.random_scene(rng) for _ in range(60)]:
        drawn = shapes.layout(scene, rng)
        found = judge.parse(shapes.render(drawn, size, rng)[None])[0]
        assert len(found) == len(drawn)
        for thing in drawn:
            nearest = min(found, key=lambda f, t=thing: abs(f.x - t.x) + abs(f.y - t.y))
            assert (nearest.colour, nearest.shape) == (thing.colour, thing.shape)
            assert nearest.x == pytest.approx(thing.x, abs=0.01)
            assert nearest.y == pytest.approx(thing.y, abs=0.01)
            assert nearest.radius == pytest.approx(thing.radius, abs=0.01)


def test_pixels_of_an_object_have_its_colour():
    rng = random.Random(3)
    layouts = [shapes.layout(shapes.random_scene(rng), rng) for _ in range(200)]
    right = []
    for colour, layout in zip(judge.unmix(noisy_images(layouts))[0], layouts):
        for thing in layout:
            covered = shapes.coverage(thing, 24) > 0.1
            right += list(colour[covered] == list(shapes.COLOURS).index(thing.colour))
    assert np.mean(right) > 0.999


def test_specks_are_no_objects():
    image = shapes.render([Thing("red", "circle", 0.3, 0.3, 0.13)])
    image[20, 20] = shapes.COLOURS["blue"]
    assert [thing.colour for thing in judge.parse(image[None])[0]] == ["red"]


# -------------------------------------------------------------------------------------- accuracy
def oracle(data, shift=0):
    """A pipeline that draws the validation scenes, or those `shift` places further on."""
    scenes, captions, _ = judge.validation_scenes(data, 64)

    def generate(prompts, first, **sampling):
        places = range(first, first + len(prompts))
        assert prompts == [captions[i] for i in places]
        assert sampling == {"progress": True, "steps": 3}
        rng = random.Random(0)
        order = [scenes[(i + shift) % 64] for i in places]
        return np.stack([shapes.render(shapes.layout(scene, rng), 24, rng) for scene in order])
    return SimpleNamespace(generate=generate)


def test_a_pipeline_that_draws_the_scenes_is_right_in_all(toy_data, capsys):
    figures, table = judge.accuracy(oracle(toy_data), toy_data, 64, steps=3)
    assert set(table) == set(ROWS)
    assert figures == {name: 100 for name in ROWS} | {"all_ci": 0, "samples": 64}
    judge.print_accuracy(figures, table, "oracle")
    printed = capsys.readouterr().out
    assert "oracle" in printed and printed.count("100.0") == len(ROWS)
    figures, table = judge.accuracy(oracle(toy_data), toy_data, 9, first=50, steps=3)
    assert figures["all"] == 100 and len(table["all"]) == figures["samples"] == 9
    figures, _ = judge.accuracy(oracle(toy_data, shift=1), toy_data, 64, steps=3)
    assert figures["all"] < 10 and figures["all_ci"] < 10


def test_figures_count_only_scenes_to_which_they_apply(toy_data):
    scenes, captions, unseen = judge.validation_scenes(toy_data, 10)
    assert unseen.tolist() == 5 * [False, True]
    assert len(captions) == 10 and judge.validation_scenes(toy_data, 10)[1] == captions
    table = judge.grade_images(np.full((10, 24, 24, 3), 240, np.uint8), scenes, unseen)
    one_group = [scene.relation is None for scene in scenes]
    assert np.isnan(table["relation"]).tolist() == one_group
    assert np.isnan(table["all_unseen"]).tolist() == (~unseen).tolist()
    assert np.nansum(list(table.values())) == 0


def test_a_world_of_one_group_has_no_figure_for_relations(tmp_path, capsys):
    data = shapes.build(tmp_path / "simple", 15, train=2, val=64, simple=True)
    figures, table = judge.accuracy(oracle(data), data, 64, steps=3)
    assert "relation" not in figures and figures["all"] == figures["count"] == 100
    judge.print_accuracy(figures, table, "oracle")
    assert "relation" not in capsys.readouterr().out


def test_data_without_scenes_cannot_be_graded(coco):
    with pytest.raises(UserError, match="no scenes"):
        judge.validation_scenes(coco, 4)
