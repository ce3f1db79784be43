"""Scenes in other words: other languages, long texts, common-sense narratives, lines for an LLM.

The tiny CLIP learns from short English captions alone and reads 20 tokens. A prompt in German, a
paragraph, or "balls the colour of grass" needs a language model that has read more. Here is what it
reads; all of it can be checked against the scene.

    scene = Scene((Group(3, "green", "circle"), Group(1, "blue", "square")), "above")
    tell(scene, "spanish", rng)   # 'tres círculos verdes encima de un cuadrado azul'
    tell(scene, "german", rng)    # 'ein Bild von drei grünen Kreisen über einem blauen Quadrat'
    tell(scene, "chinese", rng)   # '三个绿色的圆形在一个蓝色的正方形上方'
    paragraph(scene, rng)         # 'The style is plain, ... At the top there are three green ...'
    narrative(scene, rng)         # 'a trio of balls the colour of grass floating over a brick ...'
    tag_example(scene, rng)       # 'scene: three green circles above ... . green square: 2'

The tables have the words of `toy.shapes` ("circle", "red", 1, "above") as keys. In them '[a|b]'
stands for a or b, and '/' separates the forms of a word.
"""
import json
import random
import re
from itertools import product
from pathlib import Path

from common import atomic_write, read_json
from toy import shapes
from toy.shapes import LABELS, NUMBERS, OPPOSITE, PREPOSITIONS, Scene

LANGUAGES = ("english", "spanish", "german", "chinese")
UNSEEN_LANGUAGES = ("french", "italian")         # neither the tiny LLM nor an adapter has read them


def fill(text, rng):
    """'a [warm|soft] light' -> 'a soft light': one of the wordings in each pair of brackets."""
    return re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("|")), text)


def either_way(scene, rng):
    """(first group, second group, relation): as in the scene, or turned round half of the time."""
    first, second = scene.groups
    if rng.random() < 0.5:
        return first, second, scene.relation
    return second, first, OPPOSITE[scene.relation]


# --------------------------------------------------------------------------------------- languages
# {a} and {b} are the two groups; the opening "{}" adds nothing. "plain" and "place first" are word
# orders; the second may have another form, after '/', for a plural {a}. French and Italian
# words have the forms of Spanish ones.
SPANISH = {
    # gender/one/many
    "circle": "[m/círculo/círculos|m/disco/discos|f/figura circular/figuras circulares]",
    "square": "[m/cuadrado/cuadrados|f/figura cuadrada/figuras cuadradas]",
    "triangle": "[m/triángulo/triángulos|f/figura triangular/figuras triangulares]",
    # masculine/feminine/masculine plural/feminine plural
    "red": "rojo/roja/rojos/rojas", "green": "verde/verde/verdes/verdes",
    "blue": "azul/azul/azules/azules",
    "yellow": "amarillo/amarilla/amarillos/amarillas",
    "purple": "[morado/morada/morados/moradas|violeta/violeta/violetas/violetas]",
    1: "[un/una|un solo/una sola]", 2: "[dos|2|un par de]", 3: "[tres|3]", 4: "[cuatro|4]",
    "above": "[encima de|sobre|por encima de]", "below": "[debajo de|bajo|por debajo de]",
    "left of": "[a la izquierda de|justo a la izquierda de]",
    "right of": "[a la derecha de|justo a la derecha de]",
    "opening": "[{}|{}|{}|una imagen de {}|un dibujo de {}|una foto de {}]",
    "plain": "{a} {there} {b}",
    "place first": "{there} {b} hay {a}",
}
FRENCH = {
    "circle": "[m/cercle/cercles|m/disque/disques]",
    "square": "m/carré/carrés", "triangle": "m/triangle/triangles",
    "red": "rouge/rouge/rouges/rouges", "green": "vert/verte/verts/vertes",
    "blue": "bleu/bleue/bleus/bleues", "yellow": "jaune/jaune/jaunes/jaunes",
    "purple": "violet/violette/violets/violettes",
    1: "[un/une|un seul/une seule]", 2: "[deux|2]", 3: "[trois|3]", 4: "[quatre|4]",
    "above": "au-dessus de", "below": "[au-dessous de|sous]",
    "left of": "à gauche de", "right of": "à droite de",
    "opening": "[{}|{}|{}|une image de {}|un dessin de {}]",
    "plain": "{a} {there} {b}",
    "place first": "{there} {b} il y a {a}",
}
ITALIAN = {
    "circle": "[m/cerchio/cerchi|m/disco/dischi]",
    "square": "m/quadrato/quadrati", "triangle": "m/triangolo/triangoli",
    "red": "rosso/rossa/rossi/rosse", "green": "verde/verde/verdi/verdi",
    "blue": "blu/blu/blu/blu", "yellow": "giallo/gialla/gialli/gialle",
    "purple": "viola/viola/viola/viola",
    1: "[un/una|un solo/una sola]", 2: "[due|2]", 3: "[tre|3]", 4: "[quattro|4]",
    "above": "[sopra|al di sopra di]", "below": "[sotto|al di sotto di]",
    "left of": "a sinistra di", "right of": "a destra di",
    "opening": "[{}|{}|{}|un'immagine di {}|un disegno di {}]",
    "plain": "{a} {there} {b}",
    "place first": "{there} {b} [c'è|si trova] {a}/{there} {b} [ci sono|si trovano] {a}",
}
GERMAN = {
    # gender/one/many/many in the dative
    "circle": "[m/Kreis/Kreise/Kreisen|f/Scheibe/Scheiben/Scheiben]",
    "square": "n/Quadrat/Quadrate/Quadraten",
    "triangle": "n/Dreieck/Dreiecke/Dreiecken",
    "red": "rot{ending}", "green": "grün{ending}", "blue": "blau{ending}",
    "yellow": "gelb{ending}", "purple": "[violett{ending}|lila]",
    1: "[{article}|{article} einzeln{ending}]", 2: "[zwei|2]", 3: "[drei|3]", 4: "[vier|4]",
    # all of these, and "von" and "mit", take the dative
    "above": "[über|oberhalb von]", "below": "[unter|unterhalb von]",
    "left of": "[links von|links neben]", "right of": "[rechts von|rechts neben]",
    "opening": "[{}|{}|{}|ein Bild von {}|ein Bild mit {}|eine Zeichnung von {}]",
    "plain": "{a} {there} {b}",
    "place first": "{there} {b} [ist|befindet sich] {a}/{there} {b} [sind|befinden sich] {a}",
}
# nominative/dative
GERMAN_ARTICLES = {"m": "ein/einem", "f": "eine/einer", "n": "ein/einem"}
GERMAN_ENDINGS = {"m": "er/en", "f": "e/en", "n": "es/en", "plural": "e/en"}
CHINESE = {
    "circle": "[圆形|圆盘]", "square": "[正方形|方块]", "triangle": "三角形",
    "red": "[红色|红色的]", "green": "[绿色|绿色的]", "blue": "[蓝色|蓝色的]",
    "yellow": "[黄色|黄色的]", "purple": "[紫色|紫色的]",
    # two of a thing are 两, never 二
    1: "一个", 2: "[两个|2个]", 3: "[三个|3个]", 4: "[四个|4个]",
    "above": "[上方|上面]", "below": "[下方|下面]",
    "left of": "[左边|左侧]", "right of": "[右边|右侧]",
    "opening": "[{}|{}|{}|一张{}的图片|一张画着{}的图片|图中有{}]",
    "plain": "{a}[在|位于]{b}{there}",
    "place first": "{b}{there}有{a}",
}


# Each of the following puts a group into words. dative: a case that only German has.
def romance(words, group, rng, dative):
    """'dos figuras circulares rojas': numeral and adjective agree with the noun."""
    gender, one, many = fill(words[group.shape], rng).split("/")
    feminine = gender == "f"
    plural = group.count > 1
    number = fill(words[group.count], rng).split("/")[feminine and not plural]
    colour = fill(words[group.colour], rng).split("/")[2 * plural + feminine]
    return f"{number} {many if plural else one} {colour}"


def german(words, group, rng, dative):
    """'ein roter Kreis', dative: 'einem roten Kreis'; 'zwei rote Kreise', 'zwei roten Kreisen'."""
    gender, one, many, many_dative = fill(words[group.shape], rng).split("/")
    if group.count == 1:
        noun = one
        article = GERMAN_ARTICLES[gender].split("/")[dative]
        ending = GERMAN_ENDINGS[gender].split("/")[dative]
    else:
        noun = many_dative if dative else many
        article = ""
        ending = GERMAN_ENDINGS["plural"].split("/")[dative]
    text = fill(f"{words[group.count]} {words[group.colour]} {noun}", rng)
    return text.format(article=article, ending=ending)


def chinese(words, group, rng, dative):
    """'两个红色的圆形': a numeral with its measure word, the colour, the noun."""
    return fill(words[group.count] + words[group.colour] + words[group.shape], rng)


WORDS = {
    "spanish": SPANISH, "french": FRENCH, "italian": ITALIAN, "german": GERMAN, "chinese": CHINESE,
}
PHRASES = {
    "spanish": romance, "french": romance, "italian": romance, "german": german, "chinese": chinese,
}


def tell(scene, language, rng):
    """One caption of a scene in a language, with synonyms and several word orders."""
    if language == "english":
        return shapes.sentence(scene, rng)
    words = WORDS[language]
    phrase = PHRASES[language]
    # German uses the dative after an opening and after a preposition
    opening = fill(words["opening"], rng)
    if len(scene.groups) == 1:
        text = phrase(words, scene.groups[0], rng, dative=opening != "{}")
    else:
        first, second, relation = either_way(scene, rng)
        order = words["plain"]
        if rng.random() < 0.2:
            opening = "{}"
            order = words["place first"].split("/")[-1 if first.count > 1 else 0]
        order = fill(order, rng)
        a = phrase(words, first, rng, dative=opening != "{}")
        b = phrase(words, second, rng, dative=True)
        text = order.format(a=a, b=b, there=fill(words[relation], rng))
    text = opening.format(text)
    return text.replace(" de un", " d'un") if language == "french" else text


def plain(scene):
    """The scene in one English wording: 'three green circles above a blue square'."""
    groups = scene.groups
    relation = scene.relation
    if relation in ("below", "right of"):             # a scene and its reverse read alike
        groups = groups[::-1]
        relation = OPPOSITE[relation]
    names = []
    for group in groups:
        number = "a" if group.count == 1 else NUMBERS[group.count][0]
        names.append(f"{number} {group.colour} {group.shape}{'s' * (group.count > 1)}")
    return f" {relation} ".join(names)


# -------------------------------------------------------------------------------------- long texts
CORNERS = {
    "above": "At the top", "below": "At the bottom",
    "left of": "On the left", "right of": "On the right",
}
# {language: [sentences without a colour, shape, number or relation of the toy world]}
FILLER = read_json(Path(__file__).with_name("filler.json"))
LONGEST = 22     # words (or Chinese characters) of its longest sentence


def two_sentences(scene, rng):
    """'At the top there are three green circles. Below them there is a blue square.'"""
    first, second, relation = either_way(scene, rng)
    there = rng.choice(PREPOSITIONS[OPPOSITE[relation]]).capitalize()
    first_verb = "is" if first.count == 1 else "are"
    second_verb = "is" if second.count == 1 else "are"
    pronoun = "it" if first.count == 1 else "them"
    opening = f"{CORNERS[relation]} there {first_verb} {shapes.phrase(first, rng)}."
    return f"{opening} {there} {pronoun} there {second_verb} {shapes.phrase(second, rng)}."


def length(text, language):
    """In words, or in Chinese characters."""
    return len(text if language == "chinese" else text.split())


def paragraph(scene, rng, words=(60, 120), language="english", lead=40):
    """A long prompt that describes the scene once, after filler of at least the length `lead`.

    words: its minimum and maximum `length` (there is filler for 140 words in English, for 90
    words or Chinese characters in the other languages).
    """
    space = "" if language == "chinese" else " "
    if language == "english" and scene.relation and rng.random() < 0.5:
        caption = two_sentences(scene, rng)
    else:
        caption = tell(scene, language, rng)
        caption = caption[0].upper() + caption[1:] + ("。" if language == "chinese" else ".")
    # filler is added until there is enough: its last sentence may exceed that by LONGEST
    enough = rng.randint(words[0], max(words[0], words[1] - LONGEST))
    before = rng.randint(lead, max(lead, enough - length(caption, language)))
    filler = [fill(text, rng) for text in rng.sample(FILLER[language], len(FILLER[language]))]
    sentences = []
    while filler and length(space.join(sentences), language) < before:
        sentences.append(filler.pop())
    sentences.append(caption)
    while filler and length(space.join(sentences), language) < enough:
        sentences.append(filler.pop())
    return space.join(sentences)


def write_lines(path, lines):
    """Writes objects as JSON, one a line, whole or not at all."""
    with atomic_write(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def build_parallel(folder="data/shapes", seed=0):
    """Writes annotations/parallel_train2017.jsonl, if it is not there, and returns its path.

    A line is {"language": ..., "text": ..., "english": ...}: a training scene in Spanish, German or
    Chinese, or at length in English ("long"), and in `plain` English: four lines for each scene.
    """
    annotations = Path(folder) / "annotations"
    path = annotations / "parallel_train2017.jsonl"
    if path.exists():
        return path
    rng = random.Random(seed)
    lines = []
    for image in read_json(annotations / "captions_train2017.json")["images"]:
        scene = Scene.from_json(image["scene"])
        for kind in (*LANGUAGES[1:], "long"):
            if kind == "long":
                # of all lengths: word order is learned in short ones first, then soon in long ones
                text = paragraph(scene, rng, words=(10, 120), lead=0)
            else:
                text = tell(scene, kind, rng)
            lines.append({"language": kind, "text": text, "english": plain(scene)})
    write_lines(path, lines)
    return path


# ------------------------------------------------------------------------------------ common sense
HUES = {
    "red": ("blood", "a ruby", "a strawberry", "a tomato", "a cherry"),
    "green": ("grass", "a leaf", "an emerald", "a cucumber", "moss"),
    "blue": ("the sky", "the sea", "a sapphire", "denim", "a cornflower"),
    "yellow": ("the sun", "a lemon", "a banana", "a canary", "a dandelion"),
    "purple": ("an amethyst", "lavender", "an aubergine", "a plum", "heather"),
}
BODIES = {
    "circle": ("ball", "coin", "wheel", "plate", "button"),
    "square": ("brick", "tile", "window", "napkin", "chessboard"),
    "triangle": ("tent", "pyramid", "sail", "slice of pizza", "tortilla chip"),
}
COUNTS = {
    1: ("a", "a lone", "a single", "a solitary"),
    2: ("a pair of", "a couple of", "a duo of", "twin"),
    3: ("a trio of", "a triad of", "triplet"),
    4: ("a quartet of", "a foursome of", "quadruplet"),
}
PLACES = {
    "above": ("floating over", "hovering over", "resting on top of", "perched on"),
    "below": ("beneath", "in the shade of", "sheltering under", "at the foot of"),
    "left of": ("west of", "to the west of", "on the sunset side of"),
    "right of": ("east of", "to the east of", "on the sunrise side of"),
}
CONCISE = 18     # words and marks of a narrative: 20 with start and end, the tiny CLIP's limit
ALL_HUES = [hue for hues in HUES.values() for hue in hues]
ALL_BODIES = [body for bodies in BODIES.values() for body in bodies]
# the last word for each colour and shape: no image shows what it means, only the LLM reads about it
UNHEARD = {words[-1] for table in (HUES, BODIES) for words in table.values()}


def fix_articles(text):
    """'a emerald' -> 'an emerald'."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def inflect(noun, count):
    """The noun in singular or plural: 'ball', 'balls', 'slices of pizza'."""
    if count == 1:
        return noun
    head, of, rest = noun.partition(" of ")
    return f"{head}s{of}{rest}"


def facts(rng):
    """All facts in random order: ['grass is green', 'bricks are squares', ...]."""
    lines = []
    for colour, hues in HUES.items():
        for hue in hues:
            lines.append(f"[{hue} is {colour}|the colour of {hue} is {colour}]")
    for shape, bodies in BODIES.items():
        for body in bodies:
            lines.append(f"[a {body} is a {shape}|{inflect(body, 2)} are {shape}s|"
                         f"a {body} has the shape of a {shape}]")
    for count, names in COUNTS.items():
        things = inflect("thing", count)
        for name in names:
            lines.append(f"{name} {things} means {NUMBERS[count][0]} {things}")
    for relation, names in PLACES.items():
        for name in names:
            lines.append(f"{name} means {relation}")
    return [fix_articles(fill(line, rng)) for line in rng.sample(lines, len(lines))]


def held_out_pair(hue, body):
    """True for the pairs, one in eight, that training never combines, such as ('grass', 'coin').

    Each word still occurs in other pairs: a model that knows the facts can combine them.
    """
    return (3 * ALL_HUES.index(hue) + ALL_BODIES.index(body)) % 8 == 0


def has_pair(kind, hue, body):
    """Whether narratives of this kind may have this pair of words."""
    new = held_out_pair(hue, body)
    unheard = hue in UNHEARD or body in UNHEARD
    allowed = {
        "read": not new,                             # what the LLM reads
        "heard": not new and not unheard,            # SUR-adapter's triples
        "unheard": not new and unheard,              # what the LLM has read but no triple has
        "new pair": new and not unheard,             # words of the triples, newly combined
    }
    return allowed[kind]


def narrative_phrase(group, rng, kind):
    """'a trio of balls the colour of grass', with a pair of this kind: see `has_pair`."""
    pairs = [pair for pair in product(HUES[group.colour], BODIES[group.shape])
             if has_pair(kind, *pair)]
    hue, body = rng.choice(pairs)
    count = rng.choice(COUNTS[group.count])
    noun = inflect(body, group.count)
    wordings = (f"[{noun} the colour of {hue}|{noun} coloured like {hue}|"
                f"{hue.split()[-1]}-coloured {noun}]")
    return f"{count} {fill(wordings, rng)}"


def narrative(scene, rng, kind="read", hard=None, turn=True):
    """A prompt that needs common sense: colour, shape, number and place are paraphrased.

    It has at most CONCISE words and marks. kind: of the pairs, see `has_pair`; hard: another kind,
    for one of the groups; turn: half of the narratives mention the second group first.
    """
    kinds = dict.fromkeys(scene.groups, kind)
    if hard:
        kinds[rng.choice(scene.groups)] = hard
    if len(scene.groups) == 1:
        group = scene.groups[0]
        return fix_articles(narrative_phrase(group, rng, kinds[group]))
    while True:
        first, second = scene.groups
        relation = scene.relation
        if turn:
            first, second, relation = either_way(scene, rng)
        there = rng.choice(PLACES[relation])
        a = narrative_phrase(first, rng, kinds[first])
        b = narrative_phrase(second, rng, kinds[second])
        text = fix_articles(f"{there} {b}, {a}" if rng.random() < 0.1 else f"{a} {there} {b}")
        if len(re.findall(r"\w+|[^\w\s]", text)) <= CONCISE:
            return text


def narrative_and_keywords(scene, rng, kind="read", hard=None):
    """A narrative and its keyword prompt, with the groups in the same order."""
    if scene.relation:
        first, second, relation = either_way(scene, rng)
        scene = Scene((first, second), relation)
    return narrative(scene, rng, kind, hard, turn=False), shapes.keywords(scene)


def narrative_prompts(scenes, hard="new pair"):
    """A narrative for each validation scene, the same for every run: one group has a hard pair."""
    return [narrative(scene, random.Random(i), "heard", hard) for i, scene in enumerate(scenes)]


def build_narratives(folder="data/shapes", texts=5000, seed=0):
    """Writes metadata.jsonl into train2017/ and val2017/, narratives.txt into train2017/.

    metadata.jsonl has the format of SUR-adapter's data set, a line an image: {"file_name": ...,
    "text": ..., "prompt": ...}, a narrative of heard words and its keyword prompt, with the groups
    in the same order. 30 % of the training images have a caption in place of both, since a plain
    prompt means what it says. The narratives of validation have a new pair. narratives.txt has
    `texts` further narratives, each with an unheard word. It comes last: if it exists, nothing is
    written.
    """
    done = Path(folder) / "train2017" / "narratives.txt"
    if done.exists():
        return
    for split in ("val", "train"):
        path = Path(folder) / f"{split}2017" / "metadata.jsonl"
        rng = random.Random(seed)
        lines = []
        hard = "new pair" if split == "val" else None
        content = read_json(Path(folder) / "annotations" / f"captions_{split}2017.json")
        for image in content["images"]:
            scene = Scene.from_json(image["scene"])
            if split == "train" and rng.random() < 0.3:
                text = prompt = shapes.sentence(scene, rng)
            else:
                text, prompt = narrative_and_keywords(scene, rng, "heard", hard)
            lines.append({"file_name": image["file_name"], "text": text, "prompt": prompt})
        write_lines(path, lines)
    # from training scenes, which came last
    scenes = [Scene.from_json(image["scene"]) for image in content["images"][-texts:]]
    narratives = [narrative(scene, rng, "heard", "unheard") for scene in scenes]
    with atomic_write(done) as unfinished:
        Path(unfinished).write_text("\n".join(narratives) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------ what the LLM reads
def tag_score(scene, label):
    """How well a label ("green circle") fits: 3 if one group has both, 2 if one has either."""
    colour, shape = label.split()
    agreement = [(group.colour == colour) + (group.shape == shape) for group in scene.groups]
    return 1 + max(agreement)


def tag_example(scene, rng):
    """A caption and eight labels with their scores; 1, 2 and 3 are equally frequent."""
    caption = shapes.keywords(scene) if rng.random() < 0.2 else shapes.sentence(scene, rng)
    line = f"scene: {caption}"
    for _ in range(8):
        score = rng.randint(1, 3)
        label = rng.choice([label for label in LABELS if tag_score(scene, label) == score])
        line = f"{line}. {label}: {score}"
    return line


IN_PLAIN_WORDS = ". in plain words:"    # after a narrative: its meaning follows
# the kinds of lines that the tiny LLM reads, in %
SHARES = {
    "caption": 17,       # in one of LANGUAGES, or (one in five) the keyword prompt
    "parallel": 22,      # in two languages: 'german: drei grüne Kreise ... english: three ...'
    "paragraph": 5,      # with the meaning: '... in plain words: three green ...'; half English
    "narrative": 17,     # without held-out pairs, with the meaning
    "facts": 4,          # three of them
    "tag": 35,           # a caption, eight labels, and how well each fits
}


def corpus_line(scene, rng):
    """A line of text for the tiny LLM, of a kind drawn by SHARES: about the scene, or facts."""
    kind = rng.choices(tuple(SHARES), weights=tuple(SHARES.values()))[0]
    meaning = shapes.keywords(scene) if rng.random() < 0.3 else shapes.sentence(scene, rng)
    if kind == "caption":
        language = rng.choice((*LANGUAGES, "keywords"))
        return shapes.keywords(scene) if language == "keywords" else tell(scene, language, rng)
    if kind == "parallel":
        pair = rng.sample(LANGUAGES, 2)
        return ". ".join(f"{language}: {tell(scene, language, rng)}" for language in pair)
    if kind == "paragraph":
        language = rng.choice(("english", "english", *LANGUAGES))
        return f"{paragraph(scene, rng, language=language)} in plain words: {meaning}"
    if kind == "narrative":
        return f"{narrative(scene, rng)}{IN_PLAIN_WORDS} {meaning}"
    if kind == "facts":
        return ". ".join(facts(rng)[:3])
    return tag_example(scene, rng)


def instructed_line(scene, rng):
    """A line of text for the tiny instructed LLM.

    70 % are narratives, followed by their keyword prompts, with the groups in the same order; the
    rest are lines of `corpus_line`, so that nothing is forgotten.
    """
    if rng.random() < 0.7:
        text, prompt = narrative_and_keywords(scene, rng)
        return f"{text}{IN_PLAIN_WORDS} {prompt}"
    return corpus_line(scene, rng)
