"""Captioned shapes: a world small enough for a laptop, on disk in the layout of MS-COCO.

A *scene* is one or two groups of coloured shapes and, with two groups, the relation between them.
Five English captions describe it, and a small anti-aliased image shows it.

    rng = random.Random(0)
    scene = random_scene(rng)                  # Scene((Group(3, 'green', 'circle'), ...), 'above')
    captions(scene, rng)                       # ['three green circles above a blue square', ...]
    image = render(layout(scene, rng), 24)     # (24, 24, 3) uint8

Some (count, colour, shape) triples are held out of training: see `held_out`.
"""
import contextlib
import json
import math
import os
import random
import shutil
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

COLOURS = {
    "red": (214, 48, 44), "green": (52, 160, 70), "blue": (44, 92, 210),
    "yellow": (238, 190, 30), "purple": (150, 60, 176),
}
SHAPES = ("circle", "square", "triangle")
LABELS = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]   # COCO categories
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
FIELDS = ("count", "colour", "shape", "relation")    # what a scene says, and an image can get wrong


@dataclass(frozen=True)
class Group:
    count: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """`groups[0]` stands `relation` ("above") `groups[1]`; with one group the relation is None."""
    groups: tuple
    relation: str | None = None

    @staticmethod
    def from_json(scene):
        groups = tuple(Group(**group) for group in scene["groups"])
        return Scene(groups, scene["relation"])

    @property
    def unseen(self):
        """True if one of the groups is held out of training."""
        return any(held_out(group) for group in self.groups)


@dataclass(frozen=True)
class Thing:
    """One object of an image: centre and radius in units of the image's width, y downwards."""
    colour: str
    shape: str
    x: float
    y: float
    radius: float


# ------------------------------------------------------------------------------------------ scenes
def held_out(group):
    """True for the (count, colour, shape) triples, one in eight, that never occur in training.

    Any two of a count, colour and shape still occur together in other triples: a model that
    composes can draw them.
    """
    colour = list(COLOURS).index(group.colour)
    shape = SHAPES.index(group.shape)
    return (5 * group.count + 3 * colour + shape) % 8 == 0


def is_possible(scene):
    """True if there are at most 5 objects, and no two groups of the same colour and shape."""
    kinds = {(group.colour, group.shape) for group in scene.groups}
    return len(kinds) == len(scene.groups) and sum(group.count for group in scene.groups) <= 5


def random_scene(rng, unseen=False, simple=False):
    """A scene: 1 to 4 objects and, in about two of three but never if `simple`, 1 or 2 others.

    unseen: False for scenes without any held-out triple, True for scenes with at least one.
    """
    while True:
        first = Group(rng.randint(1, 4), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        second = Group(rng.randint(1, 2), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        if rng.random() < 0.7 and not simple:
            scene = Scene((first, second), rng.choice(RELATIONS))
        else:
            scene = Scene((first,))
        if is_possible(scene) and scene.unseen == unseen:
            return scene


def change_field(scene, field, rng):
    """The same scene with one of FIELDS changed: a hard negative."""
    if field == "relation":
        others = [relation for relation in RELATIONS if relation != scene.relation]
        return Scene(scene.groups, rng.choice(others))
    while True:
        i = rng.randrange(len(scene.groups))
        # a group as `random_scene` draws it; one of its fields is taken
        other = Group(rng.randint(1, 2 if i else 4), rng.choice(list(COLOURS)), rng.choice(SHAPES))
        groups = list(scene.groups)
        groups[i] = replace(groups[i], **{field: getattr(other, field)})
        changed = Scene(tuple(groups), scene.relation)
        if changed != scene and is_possible(changed):
            return changed


# ---------------------------------------------------------------------------------------- captions
NUMBERS = {
    1: ("one", "a", "a single"), 2: ("two", "2", "a pair of"),
    3: ("three", "3"), 4: ("four", "4"),
}
NOUNS = {"circle": ("circle", "disc"), "square": ("square",), "triangle": ("triangle",)}
ADJECTIVES = {colour: (colour,) for colour in COLOURS} | {"purple": ("purple", "violet")}
PREPOSITIONS = {
    "above": ("above", "over", "on top of"), "below": ("below", "under", "beneath"),
    "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
}


def phrase(group, rng):
    """'two red circles', in one of its wordings."""
    noun = rng.choice(NOUNS[group.shape]) + "s" * (group.count > 1)
    return f"{rng.choice(NUMBERS[group.count])} {rng.choice(ADJECTIVES[group.colour])} {noun}"


def sentence(scene, rng):
    """One English caption: synonyms, and three word orders, the third rare."""
    opening = rng.choice(("", "", "a picture of ", "an image of "))
    first = phrase(scene.groups[0], rng)
    if len(scene.groups) == 1:
        return opening + first
    second = phrase(scene.groups[1], rng)
    there = rng.choice(PREPOSITIONS[scene.relation])
    back = rng.choice(PREPOSITIONS[OPPOSITE[scene.relation]])
    verb = "is" if scene.groups[0].count == 1 else "are"
    orders = (f"{opening}{first} {there} {second}",
              f"{opening}{second} {back} {first}",
              f"{there} {second} {verb} {first}")
    return rng.choices(orders, weights=(50, 40, 10))[0]


def keywords(scene):
    """'green, circle, x3, above, blue, square': the prompt style of image-sharing sites."""
    words = []
    for group in scene.groups:
        if words:
            words.append(scene.relation)
        words += [group.colour, group.shape]
        if group.count > 1:
            words.append(f"x{group.count}")
    return ", ".join(words)


def captions(scene, rng):
    """Five captions, as in COCO: four sentences and one keyword prompt."""
    return [sentence(scene, rng) for _ in range(4)] + [keywords(scene)]


# ------------------------------------------------------------------------------------------ images
CELLS = 3                    # objects stand in a grid of 3 x 3 cells, with jitter
RADIUS = (0.115, 0.138)      # half the width of an object (2.8 to 3.3 px of 24)
BACKGROUND = (232, 252)      # range of each channel of the background
SQUARE = 0.92                # half the side of a square of radius 1
AREA = {"circle": np.pi, "square": 4 * SQUARE**2, "triangle": 2.0}    # of a shape of radius 1


def choose_cells(scene, rng):
    """The cells (column, row) of each group's objects: the groups stand on either side of a line.

    Arrangements that satisfy a second relation (all of one group above *and* left of the other) are
    rejected.
    """
    cells = list(product(range(CELLS), repeat=2))
    if len(scene.groups) == 1:
        return [rng.sample(cells, scene.groups[0].count)]
    axis = 1 if scene.relation in ("above", "below") else 0
    while True:
        line = rng.randint(1, CELLS - 1)
        sides = [[cell for cell in cells if cell[axis] < line],
                 [cell for cell in cells if cell[axis] >= line]]
        if scene.relation in ("below", "right of"):
            sides.reverse()
        if any(len(side) < group.count for side, group in zip(sides, scene.groups)):
            continue
        places = [rng.sample(side, group.count) for side, group in zip(sides, scene.groups)]
        a, b = ([cell[1 - axis] for cell in place] for place in places)
        if max(a) >= min(b) and max(b) >= min(a):    # not separated along the other axis too
            return places


def layout(scene, rng):
    """Places the objects of a scene: a list of `Thing`."""
    things = []
    for group, cells in zip(scene.groups, choose_cells(scene, rng)):
        for column, row in cells:
            radius = rng.uniform(*RADIUS)
            # jitter that leaves more than a pixel of 24 between neighbours
            slack = 0.5 / CELLS - radius - 0.026
            x = (column + 0.5) / CELLS + rng.uniform(-slack, slack)
            y = (row + 0.5) / CELLS + rng.uniform(-slack, slack)
            things.append(Thing(group.colour, group.shape, x, y, radius))
    return things


def coverage(thing, size):
    """The share of each pixel that an object covers, by its signed distance to the pixel's centre.

    Returns (size, size) in [0, 1].
    """
    pixel = (np.arange(size) + 0.5) / size
    dx = pixel[None, :] - thing.x
    dy = pixel[:, None] - thing.y
    r = thing.radius
    if thing.shape == "circle":
        distance = np.sqrt(dx**2 + dy**2) - r
    elif thing.shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - SQUARE * r
    else:                            # the apex is up; base and height are 2 r, so slopes are 2
        distance = np.maximum(dy - r, (2 * np.abs(dx) - dy - r) / 5**0.5)
    return np.clip(0.5 - distance * size, 0, 1)


def render(things, size=24, rng=None):
    """Draws a list of `Thing` as (size, size, 3) uint8; `rng` varies all colours a little."""
    def channels(low, high):
        return [rng.uniform(low, high) if rng else (low + high) / 2 for _ in range(3)]

    image = np.ones((size, size, 3)) * channels(*BACKGROUND)
    for thing in things:
        alpha = coverage(thing, size)[..., None]
        image = (1 - alpha) * image + alpha * (np.array(COLOURS[thing.colour]) + channels(-8, 8))
    return np.clip(image.round(), 0, 255).astype(np.uint8)


def neighbourhood(images):
    """The 3 x 3 pixels around each pixel: (N, H, W) -> (9, N, H, W); the border is repeated."""
    h, w = images.shape[1:]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.stack([padded[:, i:i + h, j:j + w] for i in range(3) for j in range(3)])


def degrade(image, things, rng):
    """An image (S, S, 3) made worse in up to four ways: ragged edges, blur, noise, pale colours.

    Returns the image and its quality, from 0 to 1; that of the original image would be 0.8. Half
    of the images get more vivid colours instead of pale ones, which makes them better.
    """
    ragged = rng.random() * (rng.random() < 0.5)     # each of these is 0 in half of the images
    blur = rng.random() * (rng.random() < 0.5)
    noise = rng.random() * (rng.random() < 0.5)
    pale = rng.uniform(-1 / 3, 0) if rng.random() < 0.5 else rng.random()    # below 0: vivid
    pixel_rng = np.random.default_rng(rng.getrandbits(32))
    x = image.astype(float)
    if ragged:                                       # each object loses pixels of its border
        for thing in things:
            alpha = coverage(thing, len(image))
            border = (alpha > 0) & (alpha < 0.9)
            lost = (pixel_rng.random(alpha.shape) < 0.5 * ragged) & border
            x[lost] = np.median(x.reshape(-1, 3), axis=0)             # the background
    x = x + 0.6 * pale * (245 - x)                   # towards white or, if vivid, away from it
    if blur:
        around = neighbourhood(x.transpose(2, 0, 1)).mean(0).transpose(1, 2, 0)
        x = (1 - 0.7 * blur) * x + 0.7 * blur * around
    x = x + 20 * noise * pixel_rng.standard_normal(x.shape)
    quality = (0.8 - 0.6 * pale) * math.prod(1 - 0.8 * amount for amount in (ragged, blur, noise))
    return np.clip(x.round(), 0, 255).astype(np.uint8), round(quality, 4)


# ----------------------------------------------------------------------------------------- on disk
def annotation(thing, size):
    """Segmentation, box and area of an object, in pixels, as COCO has them."""
    if thing.shape == "circle":
        corners = [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 24, endpoint=False)]
    elif thing.shape == "square":
        corners = [(-SQUARE, -SQUARE), (SQUARE, -SQUARE), (SQUARE, SQUARE), (-SQUARE, SQUARE)]
    else:
        corners = [(0, -1), (1, 1), (-1, 1)]
    xs = [round(float(thing.x + x * thing.radius) * size, 2) for x, _ in corners]
    ys = [round(float(thing.y + y * thing.radius) * size, 2) for _, y in corners]
    polygon = [v for point in zip(xs, ys) for v in point]          # [x1, y1, x2, y2, ...]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    area = AREA[thing.shape] * (thing.radius * size)**2
    return {
        "iscrowd": 0,
        "segmentation": [polygon],
        "bbox": [round(v, 2) for v in box],
        "area": round(area, 2),
    }


def write_split(folder, split, scenes, size, rng, degraded=False):
    """Writes <split>2017/*.png and annotations/{captions,instances}_<split>2017.json.

    degraded: the images are made worse by `degrade`, and have their quality in the annotations.
    """
    folder = Path(folder)
    (folder / f"{split}2017").mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images = []
    texts = []
    instances = []
    for i, scene in enumerate(tqdm(scenes, desc=f"drawing {split} scenes", leave=False)):
        things = layout(scene, rng)
        pixels = render(things, size, rng)
        entry = {"id": i, "file_name": f"{i:012d}.png", "width": size, "height": size,
                 "scene": asdict(scene), "unseen": scene.unseen}
        if degraded:
            pixels, entry["quality"] = degrade(pixels, things, rng)
        Image.fromarray(pixels).save(folder / f"{split}2017" / entry["file_name"], compress_level=1)
        images.append(entry)
        for text in captions(scene, rng):
            texts.append({"id": len(texts), "image_id": i, "caption": text})
        for thing in things:
            label = 1 + LABELS.index(f"{thing.colour} {thing.shape}")
            instance = {"id": len(instances), "image_id": i, "category_id": label}
            instances.append(instance | annotation(thing, size))
    categories = [{"id": i, "name": name, "supercategory": "shape"}
                  for i, name in enumerate(LABELS, 1)]
    content = {"images": images, "annotations": texts}
    (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))
    content = {"images": images, "annotations": instances, "categories": categories}
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@contextlib.contextmanager
def atomic_folder(folder):
    """Yields a temporary folder, renamed when the block ends; an interrupted one leaves nothing."""
    unfinished = Path(f"{folder}.unfinished-{os.getpid()}")
    try:
        yield unfinished
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def build(folder="data/shapes", size=24, train=20_000, val=4_096, seed=0, simple=False):
    """Writes the whole data set, if it is not there, and returns its folder; simple: of one group.

    Every second validation scene has a held-out triple, the others have none.
    """
    folder = Path(folder)
    if (folder / "annotations" / "instances_val2017.json").exists():
        return folder
    print(f"drawing {train + val:,} captioned scenes of {size} x {size} px into {folder}/")
    rng = random.Random(seed)
    with atomic_folder(folder) as unfinished:
        scenes = [random_scene(rng, False, simple) for _ in range(train)]
        write_split(unfinished, "train", scenes, size, rng)
        scenes = [random_scene(rng, i % 2 == 1, simple) for i in range(val)]
        write_split(unfinished, "val", scenes, size, rng)
    return folder


def build_quality(folder="data/shapes", size=24, count=8_192, seed=1):
    """Adds the split "quality", if it is not there: further scenes, of differing quality."""
    folder = Path(folder)
    if not (folder / "annotations" / "instances_quality2017.json").exists():
        shutil.rmtree(folder / "quality2017", ignore_errors=True)     # of an interrupted build
        rng = random.Random(seed)
        scenes = [random_scene(rng) for _ in range(count)]
        write_split(folder, "quality", scenes, size, rng, degraded=True)
    return folder
