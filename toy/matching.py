"""Images and texts to match, in the format that `dsd.py` reads: one group a line, as JSON.

    {"pictures": ["../val2017/000000000007.png"], "texts": ["two red discs", "three red discs"],
     "right": 0, "kind": "count"}

A group is one image and several texts, or several images and one text, of which number "right" is
right; or, as in Winoground, two images and two texts, the first text for the first image and the
second for the second. Paths are relative to the file.
"""
import random
from pathlib import Path

from PIL import Image

from common import read_json
from toy import shapes
from toy.language import write_lines
from toy.shapes import FIELDS, OPPOSITE, Scene, change_field

KINDS = FIELDS               # of groups with one wrong candidate: the field that is changed


def read_scenes(folder, split):
    """[(path of the image, scene)] of a split."""
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


def one_wrong_text(folder, split, count, rng):
    """`count` images, each with a right text and one with a single field changed, KINDS in turn.

    In training, wrong texts have no held-out triples either: they would give the wrong text away.
    """
    scenes = read_scenes(folder, split)
    rng.shuffle(scenes)
    groups = []
    while len(groups) < count:
        kind = KINDS[len(groups) % 4]
        # only a scene with a relation can have it changed
        place = next(i for i, (_, scene) in enumerate(scenes)
                     if scene.relation or kind != "relation")
        path, scene = scenes.pop(place)
        for _ in range(100):                         # some scenes have no such change: left out
            changed = change_field(scene, kind, rng)
            if split != "train" or not changed.unseen:
                groups.append(shuffled(kind, [path], tell_alike([scene, changed], rng), rng))
                break
    return groups


def one_wrong_image(path, scene, kind, folder, name, size, rng):
    """A text with its image and another one, in which a single field is changed."""
    other = draw(change_field(scene, kind, rng), folder, name, size, rng)
    return shuffled(kind, [path, other], tell_alike([scene], rng), rng)


def nine_wrong_texts(path, scene, rng):
    """An image with its text and nine others, each with a single field changed."""
    wrong = set()
    while len(wrong) < 9:
        wrong.add(change_field(scene, rng.choice(KINDS), rng))
    texts = tell_alike([scene, *sorted(wrong, key=str)], rng)    # a set's order is not fixed
    return shuffled("ten", [path], texts, rng)


def swapped(path, scene, folder, name, size, rng):
    """Two images and two texts: the scene, and the scene with its groups in each other's place."""
    words = rng.getrandbits(32)
    a, b = (shapes.phrase(group, random.Random(words)) for group in scene.groups)
    # a phrase is told by its own generator, so these are the same words in another order
    texts = [f"{a} {scene.relation} {b}", f"{b} {scene.relation} {a}"]
    other = draw(Scene(scene.groups, OPPOSITE[scene.relation]), folder, name, size, rng)
    return {"pictures": [path, other], "texts": texts, "kind": "winoground"}


def build_matching(folder="data/shapes", size=24, train=5_120, test=512, others=256, seed=0):
    """Writes annotations/match_*.jsonl and their images, if they are not there; returns the folder.

    match_train: `train` groups of an image, a right and a wrong text; match_val: `test` of each of
    KINDS. match_pictures, match_ten, match_winoground: `others` groups of two images and a text, of
    an image and ten texts, of two images and two texts.
    """
    annotations = Path(folder) / "annotations"
    if (annotations / "match_winoground.jsonl").exists():
        return folder
    (Path(folder) / "match2017").mkdir(exist_ok=True)
    rng = random.Random(seed)
    write_lines(annotations / "match_train.jsonl", one_wrong_text(folder, "train", train, rng))
    write_lines(annotations / "match_val.jsonl", one_wrong_text(folder, "val", 4 * test, rng))
    with_relation = [pair for pair in read_scenes(folder, "val") if pair[1].relation]
    two = []
    ten = []
    winoground = []
    for i, (path, scene) in enumerate(rng.sample(with_relation, others)):
        kind = KINDS[i % 4]
        two.append(one_wrong_image(path, scene, kind, folder, f"{i:04d}-{kind}", size, rng))
        ten.append(nine_wrong_texts(path, scene, rng))
        winoground.append(swapped(path, scene, folder, f"{i:04d}-swapped", size, rng))
    write_lines(annotations / "match_pictures.jsonl", two)
    write_lines(annotations / "match_ten.jsonl", ten)
    write_lines(annotations / "match_winoground.jsonl", winoground)
    return folder
