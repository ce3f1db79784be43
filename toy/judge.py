"""The exact judge of the toy world: which fields of a scene does an image get right?

`parse` recovers the objects from the pixels alone, `judge` compares them with the scene. Of 5 000
rendered scenes with blur and noise, 99.5 % are judged right in every field. The judge only grades:
nothing is ever trained on what it says.

    things = parse(images)                     # a list of Thing for each image
    judge(things[0], scene)                    # {'count': True, ..., 'relation': False, ...}
    figures, table = accuracy(pipeline, data)  # held-out captions, generated and graded
"""
import functools
import random
from itertools import product

import numpy as np

import common
import image_data
from common import UserError
from toy.shapes import AREA, COLOURS, FIELDS, SHAPES, Scene, Thing, coverage, neighbourhood

CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}    # below the centre, at radius 1
SPECK = 0.012        # parts smaller than this share of an image are not objects
APART = 0.12         # a relation needs centres that are this far apart, in image widths


# ----------------------------------------------------------------------------------------- objects
def components(labels):
    """Connected components (4 neighbours) of equal label in integer label maps (N, H, W).

    Returns part numbers (N, H, W): equal within a part, unique within an image, 0 where the label
    is 0 (background).
    """
    n, h, w = labels.shape
    parts = np.where(labels > 0, np.arange(1, h * w + 1).reshape(1, h, w), 0)
    while True:                                      # the largest number spreads through its part
        grown = parts.copy()
        # a and b: each pixel and the one above it, then each and the one to its left
        for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1])):
            same = (labels[a] == labels[b]) & (labels[a] > 0)
            highest = np.where(same, np.maximum(grown[a], grown[b]), 0)
            grown[a] = np.maximum(grown[a], highest)
            grown[b] = np.maximum(grown[b], highest)
        if np.array_equal(grown, parts):
            return parts
        parts = grown


def unmix(images):
    """Each pixel as a mixture of the background and one of the colours.

    images: (N, S, S, 3) floats in [0, 255]. Returns the number of the colour (N, S, S) and its
    share, alpha (N, S, S) in [0, 1].
    """
    n = len(images)
    background = np.median(images.reshape(n, 1, 1, -1, 3), axis=3)    # most pixels are background
    shares = []
    errors = []
    for rgb in COLOURS.values():
        # project onto the line from the background to the colour
        towards = np.float32(rgb) - background
        share = ((images - background) * towards).sum(-1) / (towards**2).sum(-1)
        error = images - background - np.clip(share, 0, 1)[..., None] * towards
        shares.append(share)
        errors.append((error**2).sum(-1))
    colour = np.argmin(errors, 0)
    alpha = np.take_along_axis(np.stack(shares), colour[None], 0)[0]
    # half-covered pixels have no sure colour: they take that of the most covered pixel nearby
    most_covered = neighbourhood(alpha).argmax(0)
    colour = np.take_along_axis(neighbourhood(colour), most_covered[None], 0)[0]
    return colour, np.clip(alpha, 0, 1)


def parse(images):
    """Finds the objects in images, (N, S, S, 3) uint8 or floats in [0, 255]: N lists of `Thing`.

    An object is a connected area of mostly covered pixels of one colour, unless it is a speck.
    """
    images = np.asarray(images, np.float32)
    size = images.shape[1]
    colours, alphas = unmix(images)
    part_maps = components(np.where(alphas > 0.55, colours + 1, 0))
    owners = neighbourhood(part_maps).max(0)         # a part and its thin border
    things = []
    for colour, alpha, parts, owner in zip(colours, alphas, part_maps, owners):
        found = []
        numbers, counts = np.unique(parts, return_counts=True)
        for part in numbers[(numbers > 0) & (counts >= SPECK * size**2)]:
            inside = parts == part
            border = (parts == 0) & (owner == part)
            name = list(COLOURS)[colour[inside][0]]
            found.append(fit_thing(name, np.where(inside | border, alpha, 0)))
        things.append(found)
    return things


def fit_thing(colour, cover):
    """The `Thing` of this colour that, drawn, differs least from an object's pixels (S, S).

    Each shape is tried, with the centroid and the area of these pixels.
    """
    size = len(cover)
    pixel = (np.arange(size) + 0.5) / size
    area = float(cover.sum())
    x = float((cover.sum(0) * pixel).sum()) / area
    centroid_y = float((cover.sum(1) * pixel).sum()) / area
    things = []
    errors = []
    for shape in SHAPES:
        radius = (area / AREA[shape])**0.5 / size
        y = centroid_y - CENTROID[shape] * radius
        thing = Thing(colour, shape, x, y, radius)
        things.append(thing)
        errors.append(((coverage(thing, size) - cover)**2).sum())
    return things[np.argmin(errors)]


# ----------------------------------------------------------------------------------------- verdict
def stands(relation, first, second):
    """True if all of `first` stand in `relation` to all of `second` (lists of `Thing`)."""
    if not first or not second:
        return False
    if relation in ("below", "right of"):            # the same, seen from the other side
        first, second = second, first
    axis = "y" if relation in ("above", "below") else "x"
    last = max(getattr(thing, axis) for thing in first)
    return last + APART <= min(getattr(thing, axis) for thing in second)


def compare(members, scene):
    """Which of FIELDS are right if `members`, a list of `Thing` for each group, are its objects."""
    none_is_empty = all(members)
    pairs = [(thing, group) for things, group in zip(members, scene.groups) for thing in things]
    counts = [len(things) for things in members]
    return {
        "count": counts == [group.count for group in scene.groups],
        "colour": none_is_empty and all(thing.colour == group.colour for thing, group in pairs),
        "shape": none_is_empty and all(thing.shape == group.shape for thing, group in pairs),
        "relation": scene.relation is None or stands(scene.relation, *members),
    }


def judge(things, scene):
    """Which of FIELDS an image gets right, and whether "all" of them: {field: bool}.

    things: the objects of the image, from `parse`. Nothing says which object was meant for which
    group, so every way to share them out is tried, and the most favourable one counts.
    "count": each group has its number of objects; "colour", "shape": no group is empty, and all
    objects have the colour, or shape, of their group; "relation": all of the first group stand in
    it to all of the second (True for one group).
    """
    best = dict.fromkeys(FIELDS, False)
    best_merit = ()
    groups = range(len(scene.groups))
    if 1 <= len(things) <= 10:                       # more are no scene, and would take long
        for owners in product(groups, repeat=len(things)):
            members = [[t for t, owner in zip(things, owners) if owner == g] for g in groups]
            verdict = compare(members, scene)
            # in a tie of right fields, colour and shape tell which group an object belongs to
            merit = (sum(verdict.values()), verdict["colour"], verdict["shape"], verdict["count"])
            if merit > best_merit:
                best = verdict
                best_merit = merit
    return best | {"all": all(best.values())}


# ---------------------------------------------------------------------------------------- accuracy
ROWS = {
    "all": "all fields", "all_unseen": "  with an unseen triple",
    "count": "count", "colour": "colour", "shape": "shape", "relation": "relation",
}


@functools.cache
def validation_scenes(data, samples, first=0):
    """`samples` validation scenes from number `first` on, a caption of each, and which are unseen.

    Returns (scenes, captions, unseen: bool array), the same for every run and for all callers: do
    not change them. Raises UserError for data without scenes.
    """
    dataset = image_data.CaptionedImages(data, "val", size=24)       # reads no image
    items = dataset.items[first:first + samples]
    if not items:
        raise UserError(f"{data} has only {len(dataset)} validation scenes, none from {first} on")
    if "scene" not in items[0][2]:
        raise UserError(f"--data {data}: its annotations hold no scenes, so there is nothing to "
                        "grade exactly: eval.py --quality measures any data")
    scenes = [Scene.from_json(image["scene"]) for _, _, image in items]
    captions = [random.Random(i).choice(texts) for i, (_, texts, _) in enumerate(items, first)]
    return scenes, captions, np.array([scene.unseen for scene in scenes])


def grade_images(images, scenes, unseen):
    """What the judge says of images, uint8 (N, H, W, 3), each generated for one of the scenes.

    unseen: bool (N,), which scenes have a held-out triple.
    Returns {name of ROWS: float array (N,) of 0 and 1}, nan where it does not apply: "relation" to
    scenes of one group, "all_unseen" to scenes without a held-out triple.
    """
    verdicts = [judge(things, scene) for things, scene in zip(parse(images), scenes)]
    table = {field: np.array([verdict[field] for verdict in verdicts], float)
             for field in ("all", *FIELDS)}
    table["all_unseen"] = np.where(unseen, table["all"], np.nan)
    table["relation"][[scene.relation is None for scene in scenes]] = np.nan
    return table


def accuracy(pipeline, data, samples=2048, first=0, **sampling):
    """Generates images for held-out captions and grades them.

    samples, first: how many validation scenes, starting at which; sampling: for
    `pipeline.generate`.
    Returns (figures, table): figures has each of ROWS in %, "all_ci" (the 95 % interval of "all")
    and the number of "samples"; table is that of `grade_images`.
    """
    scenes, captions, unseen = validation_scenes(data, samples, first)
    images = pipeline.generate(captions, first=first, progress=True, **sampling)
    table = grade_images(images, scenes, unseen)
    figures = {name: 100 * float(np.nanmean(verdicts)) for name, verdicts in table.items()
               if not np.isnan(verdicts).all()}                  # such as relations of one group
    figures |= common.percent("all", table["all"])
    figures["samples"] = len(scenes)
    return figures, table


def print_accuracy(figures, table, title):
    """Prints what `accuracy` returns, each figure with its 95 % interval."""
    rows = [["held-out captions", "right, %", "+-"]]
    for name, label in ROWS.items():
        if name in figures:
            rows.append([label, figures[name], 100 * common.ci95(table[name])])
    common.print_table(rows, title)
