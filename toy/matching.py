"""Groups of images and texts to match: their format, and those of the toy world.

A file has one group a line, as JSON:
    {"pictures": ["../val2017/000000000007.png"], "texts": ["two red discs", "three red discs"],
     "right": 0, "kind": "count"}

A group is one image and several texts, or several images and one text; "right" is the number of
the right one; or, as in Winoground, two of each, the first text for the first image and the second
for the second. Paths are relative to the file. "kind" is optional: a column of the table.
"""
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import UserError, read_json, read_json_lines
from toy import shapes
from toy.language import write_lines
from toy.shapes import FIELDS, OPPOSITE, Scene, change_field

KINDS = FIELDS               # of groups with one wrong candidate: the field that is changed


def read_groups(path):
    """The groups of a file, with image paths that are valid from here."""
    groups = read_json_lines(path, path, ())
    for n, group in enumerate(groups, 1):
        try:
            sizes = [len(group["pictures"]), len(group["texts"])]
            labelled = min(sizes) == 1 < max(sizes) and group.get("right") in range(max(sizes))
            winoground = sizes == [2, 2] and "right" not in group
            are_strings = [isinstance(name, str) for name in group["pictures"] + group["texts"]]
            if not (labelled or winoground) or not all(are_strings):
                raise ValueError
            group["pictures"] = [os.path.normpath(Path(path).parent / image)
                                 for image in group["pictures"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f'{path}, line {n}: expected {{"pictures": [...], "texts": [...], '
                            '"right": number}, one of the lists of length 1, or two of each '
                            "without right") from None
    return groups


def read_scenes(folder, split):
    """[(path of the image, scene), ...] of a split."""
    content = read_json(Path(folder) / "annotations" / f"captions_{split}2017.json")
    return [(f"../{split}2017/{image['file_name']}", Scene.from_json(image["scene"]))
            for image in content["images"]]


def draw(scene, folder, name, size, rng):
    """Draws a scene into match2017/<name>.png and returns its path."""
    image = shapes.render(shapes.layout(scene, rng), size, rng)
    Image.fromarray(image).save(Path(folder) / "match2017" / f"{name}.png")
    return f"../match2017/{name}.png"


def tell_alike(scenes, rng):
    """A sentence for each scene, in the same words as far as the scenes allow."""
    words = rng.getrandbits(32)
    return [shapes.sentence(scene, random.Random(words)) for scene in scenes]


def shuffled(kind, images, texts, rng):
    """A group of images and texts; the right candidate, the first, goes to a random place."""
    candidates = texts if len(images) == 1 else images
    order = rng.sample(range(len(candidates)), len(candidates))
    candidates[:] = [candidates[i] for i in order]
    return {"pictures": images, "texts": texts, "right": order.index(0), "kind": kind}


def change(scene, kind, split, rng):
    """The scene with a single field changed, or None if no such change is found.

    In training, a wrong scene has no held-out triples either: they would give it away.
    """
    for _ in range(100):
        changed = change_field(scene, kind, rng)
        if split != "train" or not changed.unseen:
            return changed


def one_wrong_image(kind, path, scene, changed, folder, name, size, rng):
    """A text with its image and one of the changed scene."""
    other = draw(changed, folder, name, size, rng)
    return shuffled(kind, [path, other], tell_alike([scene], rng), rng)


def one_wrong(what, scenes, split, count, folder, size, rng):
    """`count` groups with one wrong text or image (`what`), KINDS in turn; uses up the scenes."""
    groups = []
    while len(groups) < count:
        kind = KINDS[len(groups) % 4]
        # only a scene with a relation can have it changed
        place = next(i for i, (_, scene) in enumerate(scenes)
                     if scene.relation or kind != "relation")
        path, scene = scenes.pop(place)
        changed = change(scene, kind, split, rng)
        if changed and what == "text":
            groups.append(shuffled(kind, [path], tell_alike([scene, changed], rng), rng))
        elif changed:
            name = f"{split}-{len(groups):04d}"
            groups.append(one_wrong_image(kind, path, scene, changed, folder, name, size, rng))
    return groups


def nine_wrong_texts(path, scene, rng):
    """An image with its text and nine others, each with a single field changed."""
    wrong = set()
    while len(wrong) < 9:
        wrong.add(change_field(scene, rng.choice(KINDS), rng))
    texts = tell_alike([scene, *sorted(wrong, key=str)], rng)    # a set's order is not fixed
    return shuffled("ten", [path], texts, rng)


def swapped(path, scene, folder, name, size, rng):
    """Two images and two texts: the scene, and the scene with its groups swapped."""
    words = rng.getrandbits(32)
    a, b = (shapes.phrase(group, random.Random(words)) for group in scene.groups)
    # each phrase has its own generator, so these are the same words in another order
    texts = [f"{a} {scene.relation} {b}", f"{b} {scene.relation} {a}"]
    other = draw(Scene(scene.groups, OPPOSITE[scene.relation]), folder, name, size, rng)
    return {"pictures": [path, other], "texts": texts, "kind": "winoground"}


def build_matching(folder="data/shapes", size=24, train=5_120, test=512, others=256, seed=0):
    """Writes annotations/match_*.jsonl and their images, if they are not there; returns the folder.

    match_tune: `train` groups of an image, a right and a wrong text, alternating with as many of a
    text, a right and a wrong image; match_val: `test` groups of two texts for each of KINDS.
    match_pictures, match_ten, match_winoground: `others` groups of two images and a text, of an
    image and ten texts, of two images and two texts.
    """
    annotations = Path(folder) / "annotations"
    if (annotations / "match_tune.jsonl").exists():
        return folder
    (Path(folder) / "match2017").mkdir(exist_ok=True)
    rng = random.Random(seed)
    train_scenes = read_scenes(folder, "train")
    rng.shuffle(train_scenes)
    train_texts = one_wrong("text", train_scenes, "train", train, folder, size, rng)
    val_scenes = read_scenes(folder, "val")
    rng.shuffle(val_scenes)
    val_texts = one_wrong("text", val_scenes, "val", 4 * test, folder, size, rng)
    with_relation = [pair for pair in read_scenes(folder, "val") if pair[1].relation]
    two = []
    ten = []
    winoground = []
    for i, (path, scene) in enumerate(rng.sample(with_relation, others)):
        kind = KINDS[i % 4]
        changed = change_field(scene, kind, rng)
        name = f"{i:04d}-{kind}"
        two.append(one_wrong_image(kind, path, scene, changed, folder, name, size, rng))
        ten.append(nine_wrong_texts(path, scene, rng))
        winoground.append(swapped(path, scene, folder, f"{i:04d}-swapped", size, rng))
    train_images = one_wrong("image", train_scenes, "train", train, folder, size, rng)
    in_turn = [group for pair in zip(train_texts, train_images) for group in pair]
    write_lines(annotations / "match_val.jsonl", val_texts)
    write_lines(annotations / "match_pictures.jsonl", two)
    write_lines(annotations / "match_ten.jsonl", ten)
    write_lines(annotations / "match_winoground.jsonl", winoground)
    write_lines(annotations / "match_tune.jsonl", in_turn)           # last: now all are there
    return folder


# ---------------------------------------------------------------------------------------- graded
def rank(scores, right):
    """Place of the right candidate, or of the best right one: 1 if it is above all others."""
    others = np.delete(scores, right)
    behind = np.max(scores[right]) > others                  # false in a tie and for nan
    return 1 + int((~behind).sum())


def matched(groups, tables):
    """For each group with a right candidate, whether it is first: 0 and 1, (groups,).

    tables: for each group its scores (images, texts).
    """
    return np.array([rank(table.ravel(), group["right"]) == 1
                     for group, table in zip(groups, tables)], float)


def figure_prefix(name):
    """The prefix of a matcher's figures other than its figure over all kinds."""
    return {"accuracy": "", "clip_zero_shot": "clip_"}.get(name, f"{name}_")


def pair_figures(name, groups, tables):
    """% of groups matched right: {name: of all, <prefix>count: of those of a kind, ...}."""
    right = matched(groups, tables)
    kinds = np.array([group["kind"] for group in groups])
    figures = common.percent(name, right)
    for kind in KINDS:
        figures |= common.percent(figure_prefix(name) + kind, right[kinds == kind])
    return figures


def grade_pairs(pairs, scores, pictures, picture_scores, labels):
    """Grades groups of two texts and groups of two images: prints a table, returns its figures.

    pairs, pictures: the groups, as `dsd.Candidates`; scores, picture_scores: {name: (scores (M,),
    number of network evaluations)}; labels: {name: label of its row}.
    """
    figures = {}
    rows = [["right, %", "evaluations", *KINDS, "all", "+-", "two images", "+-"]]
    for name, (of_pairs, evaluations) in scores.items():
        prefix = figure_prefix(name)
        figures |= pair_figures(name, pairs.groups, pairs.tables(of_pairs))
        two_images = f"{prefix}one_text_two_pictures"
        of_pictures, _ = picture_scores[name]
        right = matched(pictures.groups, pictures.tables(of_pictures))
        figures |= common.percent(two_images, right)
        count = evaluations / len(pairs.groups)
        figures[f"{prefix}evaluations"] = count
        shown = [prefix + kind for kind in KINDS]
        shown += [name, f"{name}_ci", two_images, f"{two_images}_ci"]
        rows.append([labels[name], f"{count:.0f}", *(figures[each] for each in shown)])
    common.print_table(rows, f"{len(pairs.groups)} images with two texts, {len(pictures.groups)} "
                       "texts with two images: the wrong one differs in one field")
    figures["relation_zero_shot"] = figures["zero_shot_relation"]
    return figures
