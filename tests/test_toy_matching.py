"""The groups of images and texts that the matcher is tuned and graded on."""
import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from toy import judge, matching, shapes
from toy.shapes import ADJECTIVES, FIELDS, NOUNS, NUMBERS, OPPOSITE, Group, Scene


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = shapes.build(tmp_path_factory.mktemp("matching") / "world", train=160, val=80)
    assert matching.build_matching(folder, train=40, test=8, others=24) == folder
    return folder


def read(world, name):
    """The groups of a file, each with the scene of its first or right image."""
    path = world / "annotations" / f"match_{name}.jsonl"
    scenes = dict(matching.read_scenes(world, "train" if name == "tune" else "val"))
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    return [(group, next(scenes[image] for image in group["pictures"] if image in scenes))
            for group in groups]


def things_in(world, image):
    return judge.parse(np.asarray(Image.open(world / "annotations" / image))[None])[0]


def groups_in(text):
    """How often a sentence names each group."""
    tables = [{word: meaning for meaning, words in table.items() for word in words}
              for table in (NUMBERS, ADJECTIVES, NOUNS)]
    pattern = " ".join(f"({'|'.join(sorted(table, key=len, reverse=True))})" for table in tables)
    found = re.findall(rf"\b{pattern}s?\b", text)
    return Counter(Group(*(table[word] for table, word in zip(tables, words))) for words in found)


def test_training_groups_take_turns_a_wrong_text_and_a_wrong_image(world):
    groups = [group for group, _ in read(world, "tune")]
    assert [len(group["texts"]) for group in groups] == 40 * [2, 1]
    assert [len(group["pictures"]) for group in groups] == 40 * [1, 2]
    for of_two in (groups[::2], groups[1::2]):
        assert [group["kind"] for group in of_two] == 10 * list(FIELDS)


@pytest.mark.parametrize("name, count", [("tune", 40), ("val", 32)])
def test_a_wrong_text_is_wrong_in_one_field(world, name, count):
    groups = [(group, scene) for group, scene in read(world, name) if len(group["texts"]) == 2]
    assert [group["kind"] for group, _ in groups] == count // 4 * list(FIELDS)
    for group, scene in groups:
        right, wrong = (groups_in(group["texts"][i]) for i in (group["right"], 1 - group["right"]))
        assert right == Counter(scene.groups)
        if group["kind"] == "relation":
            assert wrong == right and len(set(group["texts"])) == 2
        else:
            [before], [after] = right - wrong, wrong - right
            different = [f for f in FIELDS[:3] if getattr(before, f) != getattr(after, f)]
            assert different == [group["kind"]]
        if name == "tune":
            assert not any(map(shapes.held_out, wrong))


def test_right_and_wrong_are_told_in_the_same_words():
    scene = Scene((Group(1, "green", "circle"), Group(1, "blue", "square")), "above")
    other = Scene((Group(1, "red", "circle"), Group(1, "blue", "square")), "above")
    for seed in range(20):
        right, wrong = matching.tell_alike([scene, other], random.Random(seed))
        assert right.replace("green", "red") == wrong


def test_the_right_candidate_goes_to_any_place():
    places = Counter()
    for seed in range(60):
        group = matching.shuffled("count", ["a"], ["right", "b", "c"], random.Random(seed))
        assert group["texts"][group["right"]] == "right" and len(set(group["texts"])) == 3
        places[group["right"]] += 1
        group = matching.shuffled("count", ["right", "b"], ["text"], random.Random(seed))
        assert group["pictures"][group["right"]] == "right" and group["texts"] == ["text"]
    assert min(places[i] for i in range(3)) > 10


@pytest.mark.parametrize("name, count", [("tune", 40), ("pictures", 24)])
def test_a_wrong_image_is_wrong_in_its_field(world, name, count):
    groups = [(group, scene) for group, scene in read(world, name) if len(group["texts"]) == 1]
    assert len(groups) == count
    for group, scene in groups:
        things = things_in(world, group["pictures"][1 - group["right"]])
        assert not judge.judge(things, scene)[group["kind"]]
        assert groups_in(group["texts"][0]) == Counter(scene.groups)
        if name == "tune":                           # a held-out triple would give it away
            triples = Counter((thing.colour, thing.shape) for thing in things)
            assert not any(shapes.held_out(Group(count, *pair)) for pair, count in triples.items())


def test_winoground_has_the_same_words_in_another_order(world):
    for group, scene in read(world, "winoground"):
        first, second = group["texts"]
        assert Counter(first.split()) == Counter(second.split()) and first != second
        a, relation, b = first.partition(f" {scene.relation} ")
        assert second == b + relation + a and groups_in(a) == Counter(scene.groups[:1])
        opposite = Scene(scene.groups, OPPOSITE[scene.relation])
        assert judge.judge(things_in(world, group["pictures"][1]), opposite)["all"]


# ---------------------------------------------------------------------------------------- grading
def test_a_tie_is_never_won():
    assert [matching.rank(np.array([3.0, 1.0, 2.0, 2.0]), i) for i in range(4)] == [1, 4, 3, 3]
    assert matching.rank(np.array([3.0, 1.0, 2.0, 2.0]), [1, 2]) == 3   # the best of several right
    assert matching.rank(np.array([1.0, math.nan]), 0) == 2
    assert matching.rank(np.array([math.nan, 1.0]), 0) == 2


def test_figures_are_of_all_groups_and_of_each_kind(capsys):
    groups = [{"right": i % 2, "kind": kind} for i, kind in enumerate(2 * FIELDS)]
    tables = [np.array([[1.0, 0.0]])] * 8                  # the first is ahead: right if i is even
    pairs = SimpleNamespace(groups=groups, tables=lambda scores: tables)
    of_pictures = [np.array([[0.0], [1.0]])] * 4           # the second is ahead, and right
    pictures = SimpleNamespace(groups=groups[1::2], tables=lambda scores: of_pictures)
    scores = {"accuracy": (None, 24), "zero_shot": (None, 16)}
    labels = {"accuracy": "tuned", "zero_shot": "not tuned"}
    figures = matching.grade_pairs(pairs, scores, pictures, scores, labels)
    assert [figures[kind] for kind in FIELDS] == [100, 0, 100, 0] and figures["accuracy"] == 50
    assert figures["one_text_two_pictures"] == 100 and figures["one_text_two_pictures_ci"] == 0
    assert figures["evaluations"] == 3 and figures["zero_shot_evaluations"] == 2
    assert figures["relation_zero_shot"] == figures["zero_shot_relation"] == 0
    assert "zero_shot_count_ci" in figures
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tuned"))
    ci = f"{figures['accuracy_ci']:.1f}"
    assert row.split()[1:] == "3 100.0 0.0 100.0 0.0 50.0".split() + [ci, "100.0", "0.0"]
