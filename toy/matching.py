"""Pictures and texts to match, of the toy world, in files that `dsd.py` reads: a JSON object a line, a group of candidates.

    {"pictures": ["../val2017/000000000007.png"], "texts": ["two red discs", "three red discs"], "right": 0, "kind": "count"}

One picture and several texts, or several pictures and one text, of which number "right" is right; or two and two, in which the first
picture goes with the first text and the second with the second, as in Winoground. Paths are relative to the file.
"""
import json
import random
from pathlib import Path

from PIL import Image

from common import whole
from toy.shapes import FIELDS, OPPOSITE, Scene, change_field, held_out, layout, phrase, render, sentence

KINDS = FIELDS[:4]


def build_matching(folder="data/shapes", size=24, train=5_120, test=512, others=256, seed=0):
    """Writes the files annotations/match_*.jsonl of a data set, with the pictures that they need, and returns its folder; once only.

    match_train: `train` pictures with a right text and one in which a single field is changed, the kinds in turn; match_val: the same, `test`
    of each kind; of `others` groups: match_pictures, a text with two pictures, match_ten, a picture with ten texts, and match_winoground.
    Right and wrong text are told in the same words, as far as the scenes allow; which comes first is left to chance. The triples that are
    held out of training do not occur in match_train, in wrong texts neither: there they would mark what is wrong.
    """
    notes = Path(folder) / "annotations"
    last = notes / "match_winoground.jsonl"
    if last.exists():
        return folder
    rng, drawn = random.Random(seed), Path(folder) / "match2017"
    drawn.mkdir(exist_ok=True)

    def scenes(split):
        return [(f"../{split}2017/{image['file_name']}", Scene.from_json(image["scene"]))
                for image in json.loads((notes / f"captions_{split}2017.json").read_text())["images"]]

    def draw(scene, name):
        Image.fromarray(render(layout(scene, rng), size, rng)).save(drawn / f"{name}.png")
        return f"../{drawn.name}/{name}.png"

    def write(name, groups):
        with whole(notes / f"match_{name}.jsonl") as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(group) + "\n" for group in groups)

    def shuffled(kind, pictures, texts):
        """A group whose right candidate, the first, goes to any place."""
        candidates = texts if len(pictures) == 1 else pictures
        order = rng.sample(range(len(candidates)), len(candidates))
        candidates[:] = [candidates[i] for i in order]
        return {"pictures": pictures, "texts": texts, "right": order.index(0), "kind": kind}

    def tell(scene, *changed):
        words = rng.getrandbits(32)
        return [sentence(one, random.Random(words)) for one in (scene, *changed)]

    def pairs(split, count):
        """`count` pictures, each with a right and a wrong text, the kinds in turn; only scenes with a relation can have it changed."""
        left, groups = scenes(split), []
        rng.shuffle(left)
        while len(groups) < count:
            kind = KINDS[len(groups) % 4]
            path, scene = left.pop(next(k for k, (_, scene) in enumerate(left) if scene.relation or kind != "relation"))
            tries = (change_field(scene, kind, rng) for _ in range(100))
            changed = next((one for one in tries if split != "train" or not any(map(held_out, one.groups))), None)
            if changed:                                                       # of some scenes any other shape would be held out
                groups.append(shuffled(kind, [path], tell(scene, changed)))
        return groups
    write("train", pairs("train", train))
    write("val", pairs("val", 4 * test))
    told, two, ten, swapped = scenes("val"), [], [], []
    for i, (path, scene) in enumerate(rng.sample([one for one in told if one[1].relation], others)):
        kind = KINDS[i % 4]
        two.append(shuffled(kind, [path, draw(change_field(scene, kind, rng), f"{i:04d}-{kind}")], tell(scene)))
        wrong = set()
        while len(wrong) < 9:
            wrong.add(change_field(scene, rng.choice(KINDS), rng))
        ten.append(shuffled("ten", [path], tell(scene, *sorted(wrong, key=str))))
        # the same words in another order
        words, first, second = rng.getrandbits(32), *scene.groups
        texts = [f"{a} {scene.relation} {b}" for a, b in ((phrase(first, random.Random(words)), phrase(second, random.Random(words))),
                                                         (phrase(second, random.Random(words)), phrase(first, random.Random(words))))]
        swapped.append({"pictures": [path, draw(Scene(scene.groups, OPPOSITE[scene.relation]), f"{i:04d}-swapped")], "texts": texts,
                        "kind": "winoground"})
    write("pictures", two)
    write("ten", ten)
    write("winoground", swapped)
    return folder
