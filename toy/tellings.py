"""The same scenes told in other ways, as text: in other languages, at length, as a riddle of common sense, and in lines for a language model.

The tiny CLIP learns from English captions alone and reads 20 tokens. Whoever wants more (a prompt in German, a paragraph, "balls the
colour of grass") needs a language model that has read more. Here is what it reads; all of it can be checked against the scene.

    scene = Scene((Group(3, "green", "circle"), Group(1, "blue", "square")), "above")
    tell(scene, "spanish", rng)      # 'tres círculos verdes encima de un cuadrado azul'
    tell(scene, "german", rng)       # 'ein Bild von drei grünen Kreisen über einem blauen Quadrat'
    tell(scene, "chinese", rng)      # '三个绿色的圆形在一个蓝色的正方形上方'
    paragraph(scene, rng)            # 'The style is plain, ... At the top there are three green circles. Below them there is ...'
    narrative(scene, rng)            # 'a trio of balls the colour of grass floating over a brick the colour of the sky'
    tag_example(scene, rng)          # 'scene: three green circles above a blue square. green square: 2'

The tables are keyed by the words of `toy.shapes` ("circle", "red", 1, "above"); '[a|b]' in them stands for a or b, '/' parts the forms of a word.
"""
import json
import random
import re
from itertools import product
from pathlib import Path

from common import whole
from toy import shapes
from toy.shapes import COLOURS, NUMBERS, OPPOSITE, PREPOSITIONS, SHAPES

LANGUAGES = ("english", "spanish", "german", "chinese")


def fill(text, rng):
    """'a [warm|soft] light' -> 'a soft light': one of the wordings in each pair of brackets."""
    return re.sub(r"\[([^]]*)\]", lambda wordings: rng.choice(wordings[1].split("|")), text)


def either_way(scene, rng):
    """(first group, second group, relation): as the scene has it, or turned round, with the opposite relation."""
    first, second = scene.groups
    return (first, second, scene.relation) if rng.random() < 0.5 else (second, first, OPPOSITE[scene.relation])


# ------------------------------------------------------------------------------------------------------------- languages
# "opening": "{}" where there is none; "plain" and "place first": word orders, where two forms stand the second is for a plural {a}
SPANISH = {
    "circle": "[m/círculo/círculos|m/disco/discos|f/figura circular/figuras circulares]",                 # gender/one/many
    "square": "[m/cuadrado/cuadrados|f/figura cuadrada/figuras cuadradas]",
    "triangle": "[m/triángulo/triángulos|f/figura triangular/figuras triangulares]",
    "red": "rojo/roja/rojos/rojas", "green": "verde/verde/verdes/verdes", "blue": "azul/azul/azules/azules",
    "yellow": "amarillo/amarilla/amarillos/amarillas",
    "purple": "[morado/morada/morados/moradas|violeta/violeta/violetas/violetas]",
    1: "[un/una|un solo/una sola]", 2: "[dos|2|un par de]", 3: "[tres|3]", 4: "[cuatro|4]",
    "above": "[encima de|sobre|por encima de]", "below": "[debajo de|bajo|por debajo de]",
    "left of": "[a la izquierda de|justo a la izquierda de]", "right of": "[a la derecha de|justo a la derecha de]",
    "opening": "[{}|{}|{}|una imagen de {}|un dibujo de {}|una foto de {}]", "plain": "{a} {there} {b}", "place first": "{there} {b} hay {a}"}
GERMAN = {
    "circle": "[m/Kreis/Kreise/Kreisen|f/Scheibe/Scheiben/Scheiben]",                                     # gender/one/many/many, dative
    "square": "n/Quadrat/Quadrate/Quadraten", "triangle": "n/Dreieck/Dreiecke/Dreiecken",
    "red": "rot{ending}", "green": "grün{ending}", "blue": "blau{ending}", "yellow": "gelb{ending}", "purple": "[violett{ending}|lila]",
    1: "[{article}|{article} einzeln{ending}]", 2: "[zwei|2]", 3: "[drei|3]", 4: "[vier|4]",
    "above": "[über|oberhalb von]", "below": "[unter|unterhalb von]",                                     # all with the dative
    "left of": "[links von|links neben]", "right of": "[rechts von|rechts neben]",
    "opening": "[{}|{}|{}|ein Bild von {}|ein Bild mit {}|eine Zeichnung von {}]",                        # von and mit: the dative too
    "plain": "{a} {there} {b}", "place first": "{there} {b} [ist|befindet sich] {a}/{there} {b} [sind|befinden sich] {a}"}
DECLENSION = {"m": (("ein", "er"), ("einem", "en")), "f": (("eine", "e"), ("einer", "en")),               # (article, adjective's ending):
              "n": (("ein", "es"), ("einem", "en")), "plural": (("", "e"), ("", "en"))}                   # nominative, dative
CHINESE = {
    "circle": "[圆形|圆盘]", "square": "[正方形|方块]", "triangle": "三角形",
    "red": "[红色|红色的]", "green": "[绿色|绿色的]", "blue": "[蓝色|蓝色的]", "yellow": "[黄色|黄色的]", "purple": "[紫色|紫色的]",
    1: "一个", 2: "[两个|2个]", 3: "[三个|3个]", 4: "[四个|4个]",                                         # two of a thing are 两, never 二
    "above": "[上方|上面]", "below": "[下方|下面]", "left of": "[左边|左侧]", "right of": "[右边|右侧]",
    "opening": "[{}|{}|{}|一张{}的图片|一张画着{}的图片|图中有{}]", "plain": "{a}[在|位于]{b}{there}", "place first": "{b}{there}有{a}"}
WORDS = {"spanish": SPANISH, "german": GERMAN, "chinese": CHINESE}


def spanish(group, rng, dative=False):
    """'dos figuras circulares rojas': article and adjective agree with the noun in gender and number."""
    gender, one, many = fill(SPANISH[group.shape], rng).split("/")
    feminine, plural = gender == "f", group.count > 1
    number = fill(SPANISH[group.count], rng).split("/")[0 if plural else feminine]
    return f"{number} {many if plural else one} {fill(SPANISH[group.colour], rng).split('/')[2 * plural + feminine]}"


def german(group, rng, dative=False):
    """'ein roter Kreis', dative 'einem roten Kreis'; 'zwei rote Kreise', dative 'zwei roten Kreisen'."""
    gender, one, many, many_dative = fill(GERMAN[group.shape], rng).split("/")
    article, ending = DECLENSION["plural" if group.count > 1 else gender][dative]
    noun = one if group.count == 1 else many_dative if dative else many
    return fill(f"{GERMAN[group.count]} {GERMAN[group.colour]} {noun}", rng).format(article=article, ending=ending)


def chinese(group, rng, dative=False):
    """'两个红色的圆形': a numeral with its measure word, the colour, the noun; nothing is inflected."""
    return fill(CHINESE[group.count] + CHINESE[group.colour] + CHINESE[group.shape], rng)


PHRASES = {"spanish": spanish, "german": german, "chinese": chinese}


def tell(scene, language, rng):
    """One caption of a scene in one of LANGUAGES: synonyms, and word orders: plain, turned round, the place first."""
    if language == "english":
        return shapes.sentence(scene, rng)
    words, phrase = WORDS[language], PHRASES[language]
    opening = fill(words["opening"], rng)
    if len(scene.groups) == 1:
        return opening.format(phrase(scene.groups[0], rng, dative=opening != "{}"))
    first, second, relation = either_way(scene, rng)
    order = words["plain"]
    if rng.random() < 0.2:
        opening, order = "{}", words["place first"].split("/")[-1 if first.count > 1 else 0]
    return opening.format(fill(order, rng).format(a=phrase(first, rng, dative=opening != "{}"), b=phrase(second, rng, dative=True),
                                                  there=fill(words[relation], rng)))


def plain(scene):
    """The scene in one English wording, the same for all ways to tell it: 'three green circles above a blue square'."""
    groups, relation = scene.groups, scene.relation
    if relation in ("below", "right of"):                               # told from either end, a scene is the same
        groups, relation = groups[::-1], OPPOSITE[relation]
    names = [f"{'a' if g.count == 1 else NUMBERS[g.count][0]} {g.colour} {g.shape}{'s' * (g.count > 1)}" for g in groups]
    return f" {relation} ".join(names)


# ------------------------------------------------------------------------------------------------------------- at length
LEAD = 40                                     # so many words (in Chinese: characters) stand before the first that matters
CONCISE = 18                                  # words and marks of a narrative at the most: with start and end, the 20 tokens that the tiny CLIP reads
CORNERS = {"above": "At the top", "below": "At the bottom", "left of": "On the left", "right of": "On the right"}
# None of these sentences has more than 15 words (22 Chinese characters), nor a colour, shape, number or relation of the world.
FILLER = {
    "english": ["It was made on [thick|smooth|rough] paper that has [aged|faded|curled] a little at the edges.",
                "A [soft|gentle|warm] light falls across the sheet, as on a [quiet|slow|lazy] morning.",
                "The style is [plain|simple|spare], with clean outlines and [hardly any|barely any|almost no] shading.",
                "Nothing moves, and the mood is [calm|peaceful|cheerful].", "There is no frame, no signature and no date.",
                "The artist seems to have worked [slowly|patiently|carefully], for the joy of it.",
                "The background is [pale|light|plain] and empty, like fog [in winter|at dawn|near a river].",
                "It could hang in a [kitchen|nursery|classroom] or stand on a [shelf|desk|piano].",
                "[Children|Visitors|Friends] who see it often smile without knowing why.",
                "The composition is [airy|open|calm], with [plenty of|much] empty space around everything.",
                "It brings back [old picture books|wooden toys|early posters] and [long afternoons|rainy holidays].",
                "A faint grain of the paper shows through the paint.", "Whoever looks for a hidden meaning will look in vain.",
                "The finish is [matt|glossy|silky] and every outline is [crisp|sharp|exact].",
                "Seen from far away it looks [printed|cut out|pasted] rather than painted.",
                "Please keep the whole scene [uncluttered|tidy|clean] and easy to read."],
    "spanish": ["La obra está hecha en papel [grueso|liso|rugoso], algo gastado en los bordes.",
                "La luz es [suave|cálida|tenue], como en las mañanas de [verano|invierno|domingo].",
                "El estilo es [sencillo|sobrio|limpio], con contornos nítidos y casi sin sombras.",
                "Nada se mueve y todo respira [calma|paz|serenidad].",
                "El artista parece haber trabajado con [paciencia|cuidado|alegría] y sin ninguna prisa.",
                "El fondo es [claro|pálido|luminoso] y está vacío, como la niebla al amanecer.",
                "Podría colgar en cualquier [cocina|escuela|biblioteca] o adornar el [escritorio|salón|pasillo].",
                "Recuerda a los [libros ilustrados|juguetes de madera|carteles antiguos] y a las tardes largas.",
                "Quien busque algún sentido oculto lo buscará en vano."],
    "german": ["Das Werk entstand auf [dickem|glattem|rauem] Papier, das am Rand etwas gelitten hat.",
               "Das Licht fällt [weich|sanft|warm] herein, wie an [ruhigen|langen|hellen] Sommermorgen.",
               "Der Stil ist [schlicht|einfach|sparsam], mit klaren Umrissen und fast ohne Schatten.",
               "Nichts bewegt sich, und die Stimmung ist [ruhig|friedlich|heiter].",
               "Wer das gemalt hat, arbeitete [langsam|geduldig|sorgfältig] und mit Freude.",
               "Der Hintergrund ist [hell|blass|zart] und leer wie Nebel [im Winter|am Morgen|am Fluss].",
               "So etwas könnte in jeder [Küche|Schule|Bücherei] hängen oder das [Regal|Zimmer|Büro] schmücken.",
               "Man denkt an [alte Bilderbücher|hölzernes Spielzeug|frühe Plakate] und an lange Nachmittage.",
               "Wer nach verborgenem Sinn sucht, der sucht vergeblich."],
    "chinese": ["作品用的是[厚实|光滑|粗糙]的纸，边缘略有磨损。", "光线[柔和|温暖|明亮]，像[夏天|冬天|周末]的清晨。",
                "风格[简洁|朴素|干净]，轮廓清晰，几乎没有阴影。", "处处都很安静，气氛[平和|宁静|轻松]。",
                "作者画得[很慢|很用心|很耐心]，也画得很快乐。", "背景[浅淡|明亮|干净]而空旷，像清晨的薄雾。",
                "它适合挂在[厨房|教室|书房]里，也可以放在书架旁。", "它让人想起[旧图画书|木头玩具|早期海报]和漫长的午后。",
                "想寻找隐藏含义的人只会白费力气。"]}


def two_sentences(scene, rng):
    """'At the top there are three green circles. Below them there is a blue square.'"""
    first, second, relation = either_way(scene, rng)
    there = rng.choice(PREPOSITIONS[OPPOSITE[relation]]).capitalize()
    verbs = ["is" if group.count == 1 else "are" for group in (first, second)]
    return (f"{CORNERS[relation]} there {verbs[0]} {shapes.phrase(first, rng)}. "
            f"{there} {'it' if first.count == 1 else 'them'} there {verbs[1]} {shapes.phrase(second, rng)}.")


def paragraph(scene, rng, words=(60, 120), language="english", lead=LEAD):
    """A long prompt with the scene told once, behind at least `lead` words of filler.

    words: at least and at most so many words, or Chinese characters; the filler is enough for some 140 in English, 90 in the others.
    """
    space, stop = ("", "。") if language == "chinese" else (" ", ".")

    def size(sentences):
        text = space.join(sentences)
        return len(text if language == "chinese" else text.split())
    if language == "english" and scene.relation and rng.random() < 0.5:
        told = two_sentences(scene, rng)
    else:
        told = tell(scene, language, rng)
        told = told[0].upper() + told[1:] + stop
    least = rng.randint(words[0], max(words[0], words[1] - 22))         # no sentence of FILLER is longer than 22: the last may go beyond it
    lead = rng.randint(lead, max(lead, least - size([told])))
    filler = [fill(sentence, rng) for sentence in rng.sample(FILLER[language], len(FILLER[language]))]
    before, after = [], []
    while filler and size(before) < lead:
        before.append(filler.pop())
    while filler and size([*before, told, *after]) < least:
        after.append(filler.pop())
    return space.join([*before, told, *after])


def build_parallel(folder="data/shapes", seed=0):
    """Writes annotations/parallel_train2017.jsonl beside the captions of the training split, and returns its path.

    A line is {"language": ..., "text": ..., "english": ...}: a scene in Spanish, German or Chinese, or at length in English ("long"), and in
    `plain` English. Each scene has a line of each kind.
    """
    notes = Path(folder) / "annotations"
    path = notes / "parallel_train2017.jsonl"
    if not path.exists():
        rng = random.Random(seed)
        with whole(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            for image in json.loads((notes / "captions_train2017.json").read_text())["images"]:
                scene = shapes.Scene.from_json(image["scene"])
                for kind in (*LANGUAGES[1:], "long"):
                    # long prompts of all lengths: word order is learned first in short ones, and then soon in the longest
                    text = paragraph(scene, rng, (10, 120), lead=0) if kind == "long" else tell(scene, kind, rng)
                    file.write(json.dumps({"language": kind, "text": text, "english": plain(scene)}, ensure_ascii=False) + "\n")
    return path


# ----------------------------------------------------------------------------------------------------------- common sense
FACTS = {"colour": {"red": ("blood", "a ruby", "a strawberry", "a tomato", "a cherry"),
                    "green": ("grass", "a leaf", "an emerald", "a cucumber", "moss"),
                    "blue": ("the sky", "the sea", "a sapphire", "denim", "a cornflower"),
                    "yellow": ("the sun", "a lemon", "a banana", "a canary", "a dandelion"),
                    "purple": ("an amethyst", "lavender", "an aubergine", "a plum", "heather")},
         "shape": {"circle": ("ball", "coin", "wheel", "plate", "button"),
                   "square": ("brick", "tile", "window", "napkin", "chessboard"),
                   "triangle": ("tent", "pyramid", "sail", "slice of pizza", "tortilla chip")},
         "count": {1: ("a", "a lone", "a single", "a solitary"), 2: ("a pair of", "a couple of", "a duo of", "twin"),
                   3: ("a trio of", "a triad of", "triplet"), 4: ("a quartet of", "a foursome of", "quadruplet")},
         "relation": {"above": ("floating over", "hovering over", "resting on top of", "perched on"),
                      "below": ("beneath", "in the shade of", "sheltering under", "at the foot of"),
                      "left of": ("west of", "to the west of", "on the sunset side of"),
                      "right of": ("east of", "to the east of", "on the sunrise side of")}}
HUES = [hue for colour in COLOURS for hue in FACTS["colour"][colour]]
BODIES = [body for shape in SHAPES for body in FACTS["shape"][shape]]


def articles(text):
    """'a emerald' -> 'an emerald'."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def some(count, noun):
    """The noun in the number of the count: 'ball', 'balls', 'slices of pizza'."""
    head, of, rest = noun.partition(" of ")
    return noun if count == 1 else f"{head}s{of}{rest}"


def facts(rng):
    """Every fact in one of its wordings, shuffled: ['grass is green', 'bricks are squares', 'a trio of things means three things', ...]."""
    lines = [f"[{hue} is {colour}|the colour of {hue} is {colour}]" for colour, hues in FACTS["colour"].items() for hue in hues]
    lines += [f"[a {body} is a {shape}|{some(2, body)} are {shape}s|a {body} has the shape of a {shape}]"
              for shape, bodies in FACTS["shape"].items() for body in bodies]
    lines += [f"{word} {some(n, 'thing')} means {NUMBERS[n][0]} {some(n, 'thing')}" for n, names in FACTS["count"].items() for word in names]
    lines += [f"{phrase} means {relation}" for relation, phrases in FACTS["relation"].items() for phrase in phrases]
    return [articles(fill(line, rng)) for line in rng.sample(lines, len(lines))]


def held_out_pair(hue, body):
    """True for the pairs such as ('grass', 'coin'), one in eight, that never meet in the narratives of training.

    Each word is still seen in other pairs: who knows the facts can put them together.
    """
    return (3 * HUES.index(hue) + BODIES.index(body)) % 8 == 0


def narrative(scene, rng, unseen=False, turn=True):
    """A prompt of at most CONCISE words and marks that needs common sense: the colour is not named, number and place are paraphrased.

    unseen: False never uses a held-out pair; True uses one, for one group of the scene; turn: half of them tell the second group first.
    """
    hard = rng.choice(scene.groups) if unseen else None

    def things(group):
        pairs = product(FACTS["colour"][group.colour], FACTS["shape"][group.shape])
        hue, body = rng.choice([pair for pair in pairs if held_out_pair(*pair) == (group is hard)])
        count, noun = rng.choice(FACTS["count"][group.count]), some(group.count, body)
        return fill(f"{count} [{noun} the colour of {hue}|{noun} coloured like {hue}|{hue.split()[-1]}-coloured {noun}]", rng)
    if len(scene.groups) == 1:
        return articles(things(scene.groups[0]))
    while True:
        first, second, relation = either_way(scene, rng) if turn else (*scene.groups, scene.relation)
        there, first, second = rng.choice(FACTS["relation"][relation]), things(first), things(second)
        text = articles(f"{there} {second}, {first}" if rng.random() < 0.1 else f"{first} {there} {second}")
        if len(re.findall(r"\w+|[^\w\s]", text)) <= CONCISE:
            return text


def build_narratives(folder="data/shapes", plain_share=0.3, seed=0):
    """Writes train2017/metadata.jsonl and val2017/metadata.jsonl beside the pictures: the format of SUR-adapter's data set.

    A line a picture: {"file_name": ..., "text": a narrative prompt, "prompt": its keyword prompt, in the same order}. Of the training pictures
    a `plain_share` has a caption in the place of both: a plain prompt means what it says. The narratives of validation have a pair held out.
    """
    for split in ("val", "train"):
        path, rng = Path(folder) / f"{split}2017" / "metadata.jsonl", random.Random(seed)
        if not path.exists():
            with whole(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
                for image in json.loads((Path(folder) / "annotations" / f"captions_{split}2017.json").read_text())["images"]:
                    scene = shapes.Scene.from_json(image["scene"])
                    if split == "train" and rng.random() < plain_share:
                        text = prompt = shapes.sentence(scene, rng)
                    else:
                        if scene.relation:
                            *groups, relation = either_way(scene, rng)
                            scene = shapes.Scene(tuple(groups), relation)
                        text, prompt = narrative(scene, rng, unseen=split == "val", turn=False), shapes.keywords(scene)
                    file.write(json.dumps({"file_name": image["file_name"], "text": text, "prompt": prompt}) + "\n")


# ------------------------------------------------------------------------------------------------- for the language model
def tag_score(scene, label):
    """How well a segment's label ("green circle") fits a scene: 3 if a group has its colour and its shape, 2 if one has either, else 1."""
    colour, shape = label.split()
    return 1 + max((group.colour == colour or group.shape == shape) + (group.colour == colour and group.shape == shape)
                   for group in scene.groups)


def tag_line(caption, label):
    """The text up to the place where a language model writes the score, ' 1', ' 2' or ' 3'."""
    return f"scene: {caption}. {label}:"


def tag_example(scene, rng, labels=1):
    """The whole line, score included, and further labels with theirs. Each score is as frequent as the others; every scene has labels of all."""
    line = shapes.keywords(scene) if rng.random() < 0.2 else shapes.sentence(scene, rng)
    for i in range(labels):
        score = rng.randint(1, 3)
        label = rng.choice([label for label in (f"{c} {s}" for c, s in product(COLOURS, SHAPES)) if tag_score(scene, label) == score])
        line = f"{line}. {label}: {score}" if i else f"{tag_line(line, label)} {score}"
    return line


def corpus(scenes, rng):
    """Lines of text to train a small language model on, one for each scene, as an iterator. Shares, in % of the lines:

    17  a caption in one of LANGUAGES, or (one in five) the keyword prompt
    22  a scene in two languages: 'german: drei grüne Kreise ... english: three green circles ...'
    5   a paragraph, half of them in English, with what it shows: '... in plain words: three green circles above a blue square'
    17  a narrative with its plain meaning, as a caption or as keywords; held-out pairs are left out
    4   three facts
    35  eight segments' labels and how well each fits the scene
    """
    for scene in scenes:
        kind = rng.choices(("caption", "parallel", "paragraph", "narrative", "facts", "tag"), weights=(17, 22, 5, 17, 4, 35))[0]
        meaning = shapes.keywords(scene) if rng.random() < 0.3 else shapes.sentence(scene, rng)
        if kind == "caption":
            language = rng.choice((*LANGUAGES, "keywords"))
            yield shapes.keywords(scene) if language == "keywords" else tell(scene, language, rng)
        elif kind == "parallel":
            yield ". ".join(f"{language}: {tell(scene, language, rng)}" for language in rng.sample(LANGUAGES, 2))
        elif kind == "paragraph":
            yield f"{paragraph(scene, rng, language=rng.choice(('english', 'english', 'english', *LANGUAGES[1:])))} in plain words: {meaning}"
        elif kind == "narrative":
            yield f"{narrative(scene, rng)}. in plain words: {meaning}"
        elif kind == "facts":
            yield ". ".join(facts(rng)[:3])
        else:
            yield tag_example(scene, rng, labels=8)
