"""Captioned shapes: a world small enough for a laptop, with an exact judge.

A *scene* is one or two groups of coloured shapes and, with two groups, the relation between them. It is told in five English
captions, drawn as a small anti-aliased picture, and written to disk in the layout of MS-COCO, so that the loader of real photographs
reads it. `parse` recovers the objects from the pixels alone and `judge` says which fields of a scene a picture gets right.

    rng = random.Random(0)
    scene = random_scene(rng)                  # Scene((Group(3, 'green', 'circle'), Group(1, 'blue', 'square')), 'above')
    captions(scene, rng)                       # ['three green circles above a blue square', ..., 'green, circle, x3, above, ...']
    picture = render(layout(scene, rng), 24)   # (24, 24, 3) uint8
    judge(parse(picture[None])[0], scene)      # {'count': True, 'colour': True, 'shape': True, 'relation': True, 'all': True}

The judge grades; it must never be trained on. Some (count, colour, shape) triples are held out of training: see `held_out`.

    python -m toy.shapes                       # writes data/shapes and a contact sheet, data/shapes/sheet.png
"""
import json
import math
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

COLOURS = {"red": (214, 48, 44), "green": (52, 160, 70), "blue": (44, 92, 210), "yellow": (238, 190, 30), "purple": (150, 60, 176)}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
FIELDS = ("count", "colour", "shape", "relation", "all")
CELLS = 3                                     # objects stand in a 3 x 3 grid, with jitter: a cell is a third of the picture
RADIUS = (0.115, 0.138)                       # half the width of an object, as a fraction of the picture (2.8 to 3.3 px of 24)
BACKGROUND = (232, 252)                       # range of each channel of the background


@dataclass(frozen=True)
class Group:
    count: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """`groups[0]` stands `relation` ("above", ...) `groups[1]`; with one group the relation is None."""
    groups: tuple
    relation: str | None = None

    @staticmethod
    def from_json(scene):
        return Scene(tuple(Group(**group) for group in scene["groups"]), scene["relation"])


@dataclass(frozen=True)
class Thing:
    """One object of a picture: centre and radius as fractions of the picture's width, y downwards."""
    colour: str
    shape: str
    x: float
    y: float
    radius: float


# ---------------------------------------------------------------------------------------------------------------- scenes
def held_out(group):
    """True for the (count, colour, shape) triples, one in eight, that never occur in training.

    Every pair of a count, a colour and a shape is still seen in other triples, so a model that composes can draw them.
    """
    return (5 * group.count + 3 * list(COLOURS).index(group.colour) + SHAPES.index(group.shape)) % 8 == 0


def random_scene(rng, unseen=False):
    """A scene: 70 % have two groups, of different colour or shape; 1 to 4 objects, then 1 or 2, at most 5 in all.

    unseen: False for scenes without any held-out triple, True for scenes with at least one.
    """
    while True:
        first = Group(rng.randint(1, 4), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        second = Group(rng.randint(1, 2), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        scene = Scene((first, second), rng.choice(RELATIONS)) if rng.random() < 0.7 else Scene((first,))
        same = len(scene.groups) == 2 and (first.colour, first.shape) == (second.colour, second.shape)
        if not same and sum(g.count for g in scene.groups) <= 5 and any(map(held_out, scene.groups)) == unseen:
            return scene


def change_field(scene, field, rng):
    """The same scene with one field ("count", "colour", "shape", "relation") of it changed: a hard negative."""
    if field == "relation":
        return Scene(scene.groups, rng.choice([r for r in RELATIONS if r != scene.relation]))
    while True:
        i = rng.randrange(len(scene.groups))
        value = {"count": rng.randint(1, 2 if i else 4), "colour": rng.choice(list(COLOURS)), "shape": rng.choice(SHAPES)}[field]
        groups = [asdict(group) for group in scene.groups]
        groups[i][field] = value
        groups = tuple(Group(**group) for group in groups)
        alike = len(groups) == 2 and (groups[0].colour, groups[0].shape) == (groups[1].colour, groups[1].shape)
        if groups != scene.groups and not alike and sum(group.count for group in groups) <= 5:
            return Scene(groups, scene.relation)


# -------------------------------------------------------------------------------------------------------------- captions
NUMBERS = {1: ("one", "a", "a single"), 2: ("two", "2", "a pair of"), 3: ("three", "3"), 4: ("four", "4")}
NOUNS = {"circle": ("circle", "disc"), "square": ("square",), "triangle": ("triangle",)}
ADJECTIVES = {"purple": ("purple", "violet")}
PREPOSITIONS = {"above": ("above", "over", "on top of"), "below": ("below", "under", "beneath"),
                "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of")}


def phrase(group, rng):
    """'two red circles', in one of its wordings."""
    noun = rng.choice(NOUNS[group.shape]) + "s" * (group.count > 1)
    return f"{rng.choice(NUMBERS[group.count])} {rng.choice(ADJECTIVES.get(group.colour, (group.colour,)))} {noun}"


def sentence(scene, rng):
    """One English caption: synonyms, and three word orders: plain, turned round, and (rarer, as in English) the place first."""
    opening = rng.choice(("", "", "a picture of ", "an image of "))
    if len(scene.groups) == 1:
        return opening + phrase(scene.groups[0], rng)
    first, second = (phrase(group, rng) for group in scene.groups)
    there, back = rng.choice(PREPOSITIONS[scene.relation]), rng.choice(PREPOSITIONS[OPPOSITE[scene.relation]])
    verb = "is" if scene.groups[0].count == 1 else "are"
    orders = (f"{opening}{first} {there} {second}", f"{opening}{second} {back} {first}", f"{there} {second} {verb} {first}")
    return rng.choices(orders, weights=(50, 40, 10))[0]


def keywords(scene):
    """'green, circle, x3, above, blue, square': the prompt style of picture-sharing sites."""
    words = [[g.colour, g.shape] + [f"x{g.count}"] * (g.count > 1) for g in scene.groups]
    return ", ".join(words[0] + ([scene.relation] + words[1] if len(words) == 2 else []))


def captions(scene, rng):
    """Five captions, as in COCO: four sentences and one keyword prompt."""
    return [sentence(scene, rng) for _ in range(4)] + [keywords(scene)]


def scene_of(caption):
    """The scene that a caption tells, in any wording of `sentence` or `keywords`; None for any other text."""
    number = {word: n for n, words in NUMBERS.items() for word in (*words, str(n))}
    noun, colour, there = ({word: name for name, words in table.items() for word in words}
                           for table in (NOUNS, {c: ADJECTIVES.get(c, (c,)) for c in COLOURS}, PREPOSITIONS))
    text = re.sub(rf"({'|'.join(COLOURS)}), ({'|'.join(SHAPES)})(?:, x(\d))?", lambda m: f"{m[3] or 1} {m[1]} {m[2]}", caption).replace(",", "")
    number_, noun_, colour_, there_ = (f"({'|'.join(words)})" for words in (number, noun, colour, there))
    group = f"{number_} {colour_} {noun_}s?"
    match = re.fullmatch(f"(?:a picture of |an image of )?{group}(?: {there_} {group})?|{there_} {group} (?:is|are) {group}", text)
    if not match:
        return None
    parts = match.groups()                                              # in "above a square is a circle" the first group comes last
    groups = tuple(Group(number[n], colour[c], noun[s]) for n, c, s in (parts[0:3], parts[4:7], parts[11:14], parts[8:11]) if n)
    return Scene(groups, there.get(parts[3] or parts[7]))


# -------------------------------------------------------------------------------------------------------------- pictures
def layout(scene, rng):
    """Places the objects of a scene: a list of `Thing`.

    Two groups stand on either side of a line between two rows (or columns) of cells. Arrangements that would also satisfy
    another relation (all of one group above *and* left of the other) are drawn again, so a picture has one relation only.
    """
    cells = list(product(range(CELLS), repeat=2))                       # (column, row)
    while True:
        if len(scene.groups) == 1:
            places = [rng.sample(cells, scene.groups[0].count)]
            break
        axis = 1 if scene.relation in ("above", "below") else 0
        line = rng.randint(1, CELLS - 1)
        sides = [[c for c in cells if c[axis] < line], [c for c in cells if c[axis] >= line]]
        if scene.relation in ("below", "right of"):
            sides.reverse()
        if any(len(side) < group.count for side, group in zip(sides, scene.groups)):
            continue
        places = [rng.sample(side, group.count) for side, group in zip(sides, scene.groups)]
        a, b = ([c[1 - axis] for c in place] for place in places)
        if max(a) >= min(b) and max(b) >= min(a):                       # not separated along the other axis too
            break
    things = []
    for group, place in zip(scene.groups, places):
        for column, row in place:
            radius = rng.uniform(*RADIUS)
            slack = 0.5 / CELLS - radius - 0.026                        # leaves more than one pixel of 24 between neighbours
            x, y = ((i + 0.5) / CELLS + rng.uniform(-slack, slack) for i in (column, row))
            things.append(Thing(group.colour, group.shape, x, y, radius))
    return things


def coverage(shape, x, y, radius, size):
    """How much of each pixel an object covers, from its signed distance to the pixel's centre (anti-aliasing).

    shape: a name of SHAPES; x, y, radius: arrays (N,) in fractions of the picture. Returns (N, size, size) in [0, 1].
    """
    pixel = (np.arange(size) + 0.5) / size
    dx = pixel[None, None, :] - np.reshape(x, (-1, 1, 1))
    dy = pixel[None, :, None] - np.reshape(y, (-1, 1, 1))
    r = np.reshape(radius, (-1, 1, 1))
    if shape == "circle":
        distance = np.sqrt(dx**2 + dy**2) - r
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.92 * r
    else:                                                               # apex up: half as wide as high at mid-height
        distance = np.maximum(dy - r, (2 * np.abs(dx) - dy - r) / 5**0.5)
    return np.clip(0.5 - distance * size, 0, 1)


def render(things, size=24, rng=None):
    """Draws a list of `Thing` as (size, size, 3) uint8; `rng` varies background and colours a little."""
    jitter = (lambda low, high: [rng.uniform(low, high) for _ in range(3)]) if rng else (lambda low, high: [(low + high) / 2] * 3)
    picture = np.ones((size, size, 3)) * jitter(*BACKGROUND)
    for thing in things:
        alpha = coverage(thing.shape, thing.x, thing.y, thing.radius, size)[0, :, :, None]
        picture = (1 - alpha) * picture + alpha * (np.array(COLOURS[thing.colour]) + jitter(-8, 8))
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- the judge
AREA = {"circle": np.pi, "square": 4 * 0.92**2, "triangle": 2.0}         # of a shape of radius 1
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}             # how far it lies below the centre, radius 1
SPECK = 0.012                                                            # parts smaller than this share of a picture are no objects
APART = 0.12                                                             # centres at least this far apart stand in a relation


def components(labels):
    """Connected parts (4 neighbours) of equal label, for a batch of label maps (N, H, W). Label 0 is background.

    Returns part numbers (N, H, W), equal within a part and unique within a picture; 0 is background.
    """
    n, h, w = labels.shape
    parts = np.where(labels > 0, np.arange(1, h * w + 1).reshape(1, h, w), 0)
    while True:                                                          # the largest number spreads through its part
        grown = parts.copy()
        for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1])):
            same = (labels[a] == labels[b]) & (labels[a] > 0)
            highest = np.where(same, np.maximum(grown[a], grown[b]), 0)
            grown[a] = np.maximum(grown[a], highest)
            grown[b] = np.maximum(grown[b], highest)
        if np.array_equal(grown, parts):
            return parts
        parts = grown


def nine(a):
    """The 3 x 3 neighbourhood of each pixel: (N, H, W) -> (9, N, H, W); border pixels repeat."""
    h, w = a.shape[1:]
    a = np.pad(a, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.stack([a[:, i:i + h, j:j + w] for i in range(3) for j in range(3)])


def parse(pictures):
    """Finds the objects in pictures from their pixels alone.

    pictures: (N, S, S, 3) uint8 or floats in [0, 255]. Returns N lists of `Thing`.
    A pixel is a mixture of background and one of the five colours. Connected pixels of one colour that are mostly covered are an
    object, if they are not a mere speck; its shape is the one whose drawing, at the same centroid and area, differs least from it.
    """
    pictures = np.asarray(pictures, np.float32)
    n, size = pictures.shape[:2]
    back = np.median(pictures.reshape(n, 1, 1, -1, 3), axis=3)                                # most of a picture is background
    shares, errors = [], []
    for colour in COLOURS.values():                                                           # project on the line background-colour
        towards = np.float32(colour) - back
        share = ((pictures - back) * towards).sum(-1) / (towards**2).sum(-1)                  # (N, S, S)
        errors.append(((pictures - back - np.clip(share, 0, 1)[..., None] * towards)**2).sum(-1))
        shares.append(share)
    colour = np.argmin(errors, 0)
    alpha = np.take_along_axis(np.stack(shares), colour[None], 0)[0]
    # half-covered pixels have no sure colour: they take that of the most covered pixel beside them
    colour = np.take_along_axis(nine(colour), nine(alpha).argmax(0)[None], 0)[0]
    alpha = np.clip(alpha, 0, 1)
    parts = components(np.where(alpha > 0.55, colour + 1, 0))
    owner = nine(parts).max(0)                                                                # a part with its thin border
    things = [[] for _ in range(n)]
    found = []                                                                                # (picture, colour, cover (S, S))
    for i in range(n):
        for part, pixels in zip(*np.unique(parts[i], return_counts=True)):
            if part and pixels >= SPECK * size**2:
                hue = colour[i][parts[i] == part][0]
                found.append((i, hue, np.where((parts[i] == part) | ((parts[i] == 0) & (owner[i] == part)), alpha[i], 0)))
    if not found:
        return things
    cover = np.stack([c for _, _, c in found])                                                # (M, S, S)
    area = cover.sum((1, 2))
    pixel = (np.arange(size) + 0.5) / size
    x, middle = (cover.sum(1) * pixel).sum(1) / area, (cover.sum(2) * pixel).sum(1) / area    # centroid
    misfit, place = [], []
    for shape in SHAPES:
        radius = np.sqrt(area / AREA[shape]) / size
        y = middle - CENTROID[shape] * radius
        misfit.append(((coverage(shape, x, y, radius, size) - cover)**2).sum((1, 2)))
        place.append((y, radius))
    for m, (i, hue, _) in enumerate(found):
        best = int(np.argmin([error[m] for error in misfit]))
        y, radius = place[best]
        things[i].append(Thing(list(COLOURS)[hue], SHAPES[best], float(x[m]), float(y[m]), float(radius[m])))
    return things


def stands(relation, first, second):
    """True if all of `first` stand in `relation` to all of `second` (lists of `Thing`)."""
    if not first or not second:
        return False
    axis = "y" if relation in ("above", "below") else "x"
    a, b = [getattr(t, axis) for t in first], [getattr(t, axis) for t in second]
    return max(a) + APART <= min(b) if relation in ("above", "left of") else max(b) + APART <= min(a)


def judge(things, scene):
    """Which fields of a scene a picture gets right: a dict from each of FIELDS to a bool.

    things: the objects of the picture, from `parse`. Every way to give each object to one of the prompted groups is tried, and the
    most favourable reading counts. `count`: each group has its number of objects; `colour`, `shape`: no group is empty and all
    objects have those of their group; `relation`: all of the first group stand in it to all of the second (True for one group).
    """
    best, best_merit = dict.fromkeys(FIELDS, False), ()
    if not things or len(things) > 10:
        return best
    groups = scene.groups
    for owner in product(range(len(groups)), repeat=len(things)):
        members = [[t for t, o in zip(things, owner) if o == g] for g in range(len(groups))]
        verdict = {"count": all(len(m) == g.count for m, g in zip(members, groups)),
                   "colour": all(m and all(t.colour == g.colour for t in m) for m, g in zip(members, groups)),
                   "shape": all(m and all(t.shape == g.shape for t in m) for m, g in zip(members, groups)),
                   "relation": scene.relation is None or stands(scene.relation, *members)}
        verdict = {field: bool(value) for field, value in verdict.items()}
        merit = (sum(verdict.values()), verdict["colour"], verdict["shape"], verdict["count"])   # what tells objects apart decides ties
        if merit > best_merit:
            best, best_merit = verdict, merit
    return best | {"all": all(best[field] for field in FIELDS[:4])}


# --------------------------------------------------------------------------------------------------------------- on disk
def outline(thing):
    """The object's border as a COCO polygon [x1, y1, x2, y2, ...], in fractions of the picture."""
    if thing.shape == "circle":
        points = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 24, endpoint=False)]
    elif thing.shape == "square":
        points = [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)]
    else:
        points = [(0, -1), (1, 1), (-1, 1)]
    return [float(v) for px, py in points for v in (thing.x + px * thing.radius, thing.y + py * thing.radius)]


def write_split(folder, split, scenes, size, rng, spoil=None):
    """Writes `<split>2017/*.png`, `annotations/captions_<split>2017.json` and `annotations/instances_<split>2017.json`.

    spoil(picture, things, rng) -> (picture, quality): changes the pictures, and says in the annotations how good they still are.
    """
    folder = Path(folder)
    (folder / f"{split}2017").mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": i + 1, "name": f"{c} {s}", "supercategory": "shape"} for i, (c, s) in enumerate(product(COLOURS, SHAPES))]
    number = {category["name"]: category["id"] for category in categories}
    images, told, instances = [], [], []
    for i, scene in enumerate(tqdm(scenes, desc=f"drawing {split} scenes", leave=False)):
        things = layout(scene, rng)
        name = f"{i:012d}.png"
        picture = render(things, size, rng)
        images.append({"id": i, "file_name": name, "width": size, "height": size, "scene": asdict(scene),
                       "unseen": any(map(held_out, scene.groups))})
        if spoil:
            picture, images[-1]["quality"] = spoil(picture, things, rng)
        Image.fromarray(picture).save(folder / f"{split}2017" / name, compress_level=1)
        told += [{"id": 5 * i + k, "image_id": i, "caption": text} for k, text in enumerate(captions(scene, rng))]
        for thing in things:
            polygon = [round(v * size, 2) for v in outline(thing)]
            xs, ys = polygon[::2], polygon[1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            instances.append({"id": len(instances), "image_id": i, "category_id": number[f"{thing.colour} {thing.shape}"], "iscrowd": 0,
                              "segmentation": [polygon], "bbox": [round(v, 2) for v in box],
                              "area": round(AREA[thing.shape] * (thing.radius * size)**2, 2)})
    notes = folder / "annotations"
    (notes / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": told}))
    (notes / f"instances_{split}2017.json").write_text(json.dumps({"images": images, "annotations": instances, "categories": categories}))


def spoil(picture, things, rng):
    """A picture (S, S, 3) made worse in up to four ways: pale colours, ragged edges, blur, noise; and its quality, from 0 to 1.

    Half of them are not paler but more vivid, and so better than those of the other splits, whose quality would be 0.8.
    """
    ragged, blur, noise = (rng.random() * (rng.random() < 0.5) for _ in range(3))
    pale = rng.uniform(-1 / 3, 0) if rng.random() < 0.5 else rng.random()          # below 0: more vivid
    size, random_ = len(picture), np.random.default_rng(rng.getrandbits(32))
    x = picture.astype(float)
    if ragged:                                                          # each object loses pixels of its border
        for thing in things:
            alpha = coverage(thing.shape, thing.x, thing.y, thing.radius, size)[0]
            eaten = (random_.random(alpha.shape) < 0.5 * ragged) & (alpha > 0) & (alpha < 0.9)
            x[eaten] = np.median(x.reshape(-1, 3), axis=0)
    x = x + 0.6 * pale * (245 - x)                                      # towards the background's white, or away from it
    if blur:                                                            # a mean of each pixel and its eight neighbours
        around = np.stack([nine(x[None, :, :, c])[:, 0].mean(0) for c in range(3)], axis=-1)
        x = (1 - 0.7 * blur) * x + 0.7 * blur * around
    x = x + 20 * noise * random_.standard_normal(x.shape)
    quality = (0.8 - 0.6 * pale) * math.prod(1 - 0.8 * amount for amount in (ragged, blur, noise))
    return np.clip(x.round(), 0, 255).astype(np.uint8), round(quality, 4)


def build_quality(folder="data/shapes", size=24, count=8_192, seed=1):
    """Adds the split "quality" to a data set and returns its folder: further pictures of scenes as in training, spoilt, with a "quality"."""
    folder = Path(folder)
    if not (folder / "annotations" / "instances_quality2017.json").exists():
        rng = random.Random(seed)
        shutil.rmtree(folder / "quality2017", ignore_errors=True)        # of an interrupted build
        write_split(folder, "quality", [random_scene(rng) for _ in range(count)], size, rng, spoil)
    return folder


def build(folder="data/shapes", size=24, train=20_000, val=4_096, seed=0):
    """Writes the whole data set once and returns its folder. An interrupted build leaves nothing: it is renamed into place when whole.

    Half of the validation scenes have a held-out triple (`"unseen": true` in the annotations), the other half have none.
    """
    folder = Path(folder)
    if (folder / "annotations" / "instances_val2017.json").exists():
        return folder
    print(f"drawing {train + val:,} captioned scenes of {size} x {size} px into {folder}/ (once, some 20 s)")
    rng = random.Random(seed)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        write_split(unfinished, "train", [random_scene(rng) for _ in range(train)], size, rng)
        write_split(unfinished, "val", [random_scene(rng, unseen=i % 2 == 1) for i in range(val)], size, rng)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
