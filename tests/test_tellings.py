"""The tellings: every caption reads back to its scene by a dictionary written here by hand, which also checks who must agree with whom."""
import random
import re
from collections import Counter
from itertools import islice, product

import pytest

from toy import shapes, tellings
from toy.shapes import COLOURS, OPPOSITE, RELATIONS, SHAPES, Group, Scene
from toy.tellings import FACTS, LANGUAGES

GROUPS = [Group(*group) for group in product(range(1, 5), COLOURS, SHAPES)]
SCENES = [Scene((group,)) for group in GROUPS] + [                       # every scene of the world, 5 940 of them
    Scene((a, b), relation) for a, b, relation in product(GROUPS, GROUPS, RELATIONS)
    if b.count <= 2 and a.count + b.count <= 5 and (a.colour, a.shape) != (b.colour, b.shape)]

# A meaning, then its words and the classes in which each may stand; the words of a phrase must have a class in common.
# English: singular, plural. Spanish: m, f, plurals p, q. German: m, f, n, plural p; datives in capitals. "_" is a space.
# Of the other meanings, "-" says nothing, "open" and "close" frame a caption, "verb" agrees with its subject, "has" is the Chinese 有.
DICTIONARY = {
    "english": """1 one:s a:s a_single:s
        2 two:p 2:p a_pair_of:p
        3 three:p 3:p
        4 four:p 4:p
        red red:sp
        green green:sp
        blue blue:sp
        yellow yellow:sp
        purple purple:sp violet:sp
        circle circle:s circles:p disc:s discs:p
        square square:s squares:p
        triangle triangle:s triangles:p
        above above over on_top_of
        below below under beneath
        left_of left_of to_the_left_of
        right_of right_of to_the_right_of
        open a_picture_of an_image_of
        verb is:s are:p""",
    "spanish": """1 un:m una:f un_solo:m una_sola:f
        2 dos:pq 2:pq un_par_de:pq
        3 tres:pq 3:pq
        4 cuatro:pq 4:pq
        red rojo:m roja:f rojos:p rojas:q
        green verde:mf verdes:pq
        blue azul:mf azules:pq
        yellow amarillo:m amarilla:f amarillos:p amarillas:q
        purple morado:m morada:f morados:p moradas:q violeta:mf violetas:pq
        circle círculo:m círculos:p disco:m discos:p figura_circular:f figuras_circulares:q
        square cuadrado:m cuadrados:p figura_cuadrada:f figuras_cuadradas:q
        triangle triángulo:m triángulos:p figura_triangular:f figuras_triangulares:q
        above encima_de sobre por_encima_de
        below debajo_de bajo por_debajo_de
        left_of a_la_izquierda_de justo_a_la_izquierda_de
        right_of a_la_derecha_de justo_a_la_derecha_de
        open una_imagen_de un_dibujo_de una_foto_de
        verb hay:mfpq""",
    "german": """1 ein:mn eine:f einem:MN einer:F
        - einzelner:m einzelne:f einzelnes:n einzelnen:MFN
        2 zwei:pP 2:pP
        3 drei:pP 3:pP
        4 vier:pP 4:pP
        red roter:m rote:fp rotes:n roten:MFNP
        green grüner:m grüne:fp grünes:n grünen:MFNP
        blue blauer:m blaue:fp blaues:n blauen:MFNP
        yellow gelber:m gelbe:fp gelbes:n gelben:MFNP
        purple violetter:m violette:fp violettes:n violetten:MFNP lila:mfnpMFNP
        circle Kreis:mM Kreise:p Kreisen:P Scheibe:fF Scheiben:pP
        square Quadrat:nN Quadrate:p Quadraten:P
        triangle Dreieck:nN Dreiecke:p Dreiecken:P
        above über oberhalb_von
        below unter unterhalb_von
        left_of links_von links_neben
        right_of rechts_von rechts_neben
        open ein_Bild_von ein_Bild_mit eine_Zeichnung_von
        verb ist:mfn befindet_sich:mfn sind:p befinden_sich:p""",
    "chinese": """1 一个:x
        2 两个:x 2个:x
        3 三个:x 3个:x
        4 四个:x 4个:x
        red 红色:x
        green 绿色:x
        blue 蓝色:x
        yellow 黄色:x
        purple 紫色:x
        - 的:x
        circle 圆形:x 圆盘:x
        square 正方形:x 方块:x
        triangle 三角形:x
        above 上方 上面
        below 下方 下面
        left_of 左边 左侧
        right_of 右边 右侧
        open 一张 一张画着 图中有
        close 的图片
        verb 在:x 位于:x
        has 有""",
    "narrative": "\n".join(                                              # by the table of facts itself, its uniqueness being tested apart
        [f"{n} " + " ".join(name.replace(" ", "_") + ":sp" for name in names) for n, names in FACTS["count"].items()] + ["1 an:sp"] +
        [f"{shape} " + " ".join(f"{form}:{c}".replace(" ", "_") for body in bodies
                                for form, c in ((body, "s"), ((body + "s").replace("slice of pizzas", "slices of pizza"), "p")))
         for shape, bodies in FACTS["shape"].items()] +
        [f"{colour} " + " ".join(f"{form}:sp".replace(" ", "_") for hue in hues
                                 for form in (f"the colour of {hue}", f"coloured like {hue}", f"{hue.split()[-1]}-coloured"))
         for colour, hues in FACTS["colour"].items()] +
        [f"{relation.replace(' ', '_')} " + " ".join(phrase.replace(" ", "_") for phrase in phrases)
         for relation, phrases in FACTS["relation"].items()] + ["verb ,:sp"])}
LEXICON = {}                                                             # language: [(word, meaning, classes)], the longest word first
for tongue, table in DICTIONARY.items():
    rows = [line.split() for line in table.splitlines()]
    entries = [(word.partition(":"), row[0].replace("_", " ")) for row in rows for word in row[1:]]
    LEXICON[tongue] = sorted(((word.replace("_", " "), meaning, set(classes)) for (word, _, classes), meaning in entries), key=lambda e: -len(e[0]))


def read(text, language):
    """The scene that a caption tells, or an AssertionError that says which word is unknown or does not agree."""
    parts, phrase, rest = [], {}, text                                   # parts: ("group", Group, classes) or (meaning, None, classes)
    while rest:
        found = next((entry for entry in LEXICON[language] if rest.startswith(entry[0])), None)
        assert found, f"{rest!r} in {text!r}"
        word, meaning, classes = found
        rest = rest[len(word):]
        assert not rest or language == "chinese" or rest[0] in " ,", f"{word!r} in {text!r}"
        rest = rest.removeprefix(" ")
        field = "count" if meaning.isdigit() else "colour" if meaning in COLOURS else "shape" if meaning in SHAPES else None
        if not field and meaning != "-":
            parts.append((meaning, None, classes))
            continue
        assert phrase or field == "count", f"no number before {word!r} in {text!r}"
        phrase.setdefault("classes", []).append(classes)
        if field:
            assert field not in phrase, text
            phrase[field] = int(meaning) if field == "count" else meaning
        if len(phrase) == 4 and not (language == "chinese" and rest.startswith("的") and not rest.startswith("的图片")):
            agreed = set.intersection(*phrase.pop("classes"))
            assert agreed, f"no agreement before {rest!r} in {text!r}"
            parts.append(("group", Group(**phrase), agreed))
            phrase = {}
    assert not phrase, text
    opened = parts[0][0] == "open"
    assert (parts[-1][0] == "close") == (language == "chinese" and opened and text[:2] == "一张"), text
    parts = parts[opened:len(parts) - (parts[-1][0] == "close")]
    kinds = ["relation" if part[0] in RELATIONS else part[0] for part in parts]
    first, second = {("group",): (0, None), ("group", "relation", "group"): (0, 2), ("relation", "group", "verb", "group"): (3, 1),
                     ("group", "verb", "group", "relation"): (0, 2), ("group", "relation", "has", "group"): (3, 0)}[tuple(kinds)]
    if language == "german":                                             # dative after a preposition, nominative else
        assert any(c.isupper() == opened for c in parts[first][2]), text
        assert second is None or any(c.isupper() for c in parts[second][2]), text
    if kinds[0] == "relation":                                           # the verb agrees with its subject, which follows it
        assert not opened and parts[2][2] & parts[3][2], text
    if second is None:
        return Scene((parts[first][1],))
    return Scene((parts[first][1], parts[second][1]), next(part[0] for part in parts if part[0] in RELATIONS))


def same(scene):
    """What two scenes have in common if they are one and the same told from either side."""
    return {(*scene.groups, scene.relation), (*scene.groups[::-1], OPPOSITE.get(scene.relation))}


def parse(text):
    """'3 green circle above 1 blue square' as a scene."""
    groups = [Group(int(n), colour, shape) for n, colour, shape in re.findall(r"(\d) (\w+) (\w+)", text)]
    return Scene(tuple(groups), next((relation for relation in RELATIONS if relation in text), None))


class Steered:
    """A random generator that follows a path of choices and notes those that it passes by."""
    def __init__(self, path):
        self.path, self.place, self.others = path, 0, []

    def choice(self, options):
        options = sorted(set(options))
        if self.place == len(self.path):
            self.others += [[*self.path, i] for i in range(1, len(options))]
            self.path = [*self.path, 0]
        self.place += 1
        return options[self.path[self.place - 1]]

    def choices(self, options, weights):
        return [self.choice(options)]

    def random(self):
        return self.choice((0.1, 0.9))


def every(text_of):
    """All texts that text_of(rng) can return."""
    texts, paths = set(), [[]]
    while paths:
        rng = Steered(paths.pop())
        texts.add(text_of(rng))
        paths += rng.others
    return texts


EXPECTED = {
    "english": """1 red circle: one red circle; a picture of a single red disc
        2 blue square: a pair of blue squares; an image of 2 blue squares
        4 purple triangle: four violet triangles
        3 green circle above 1 blue square: three green circles above a blue square; a picture of a blue square beneath 3 green discs;
            over a blue square are three green circles; an image of three green circles on top of one blue square
        1 yellow triangle left of 2 red square: a yellow triangle to the left of two red squares; two red squares right of a yellow triangle;
            to the left of a pair of red squares is one yellow triangle""",
    "spanish": """1 red circle: un círculo rojo; una imagen de una figura circular roja
        1 yellow square: un dibujo de un solo cuadrado amarillo
        3 green triangle: tres figuras triangulares verdes
        2 blue square: un par de figuras cuadradas azules
        4 purple circle: una foto de cuatro discos violetas
        1 purple triangle: una sola figura triangular morada
        3 green circle above 1 blue square: tres círculos verdes encima de un cuadrado azul; un cuadrado azul debajo de tres círculos verdes;
            sobre un cuadrado azul hay tres círculos verdes
        2 yellow triangle left of 1 red square: dos triángulos amarillos a la izquierda de una figura cuadrada roja;
            a la derecha de dos triángulos amarillos hay un solo cuadrado rojo
        1 blue circle below 2 yellow circle: un disco azul bajo dos figuras circulares amarillas
        4 red square right of 1 purple triangle: una imagen de 4 cuadrados rojos justo a la derecha de un triángulo morado
        1 green square below 2 purple triangle: por debajo de dos triángulos violetas hay una figura cuadrada verde""",
    "german": """1 red circle: ein roter Kreis; ein Bild von einem roten Kreis
        1 yellow circle: eine einzelne gelbe Scheibe; ein Bild mit einer gelben Scheibe
        1 blue square: ein blaues Quadrat; ein einzelnes blaues Quadrat
        1 blue triangle: eine Zeichnung von einem einzelnen blauen Dreieck
        3 green circle: ein Bild mit drei grünen Scheiben
        2 purple triangle: zwei violette Dreiecke; ein Bild von zwei lila Dreiecken
        1 red circle above 2 blue square: ein roter Kreis über zwei blauen Quadraten; zwei blaue Quadrate unter einem roten Kreis;
            über zwei blauen Quadraten befindet sich ein roter Kreis; unterhalb von einer roten Scheibe sind zwei blaue Quadrate
        4 green triangle left of 1 yellow circle: ein Bild von vier grünen Dreiecken links von einer gelben Scheibe;
            ein einzelner gelber Kreis rechts neben 4 grünen Dreiecken
        3 purple square below 1 red triangle: drei lila Quadrate unter einem roten Dreieck;
            unter einem einzelnen roten Dreieck befinden sich drei violette Quadrate""",
    "chinese": """1 red circle: 一个红色的圆形; 图中有一个红色圆形
        2 blue square: 两个蓝色正方形; 一张两个蓝色的正方形的图片
        3 green triangle: 图中有三个绿色的三角形
        4 purple circle: 一张画着四个紫色的圆盘的图片
        3 yellow square: 3个黄色的方块
        3 green circle above 1 blue square: 三个绿色的圆形在一个蓝色的正方形上方; 一个蓝色的正方形在三个绿色的圆形下方;
            一个蓝色的正方形上面有三个绿色的圆形; 一张三个绿色的圆形在一个蓝色的正方形上方的图片
        2 red triangle left of 2 yellow circle: 两个红色的三角形位于两个黄色的圆盘左侧; 两个黄色圆形在两个红色三角形右边;
            两个红色三角形右侧有两个黄色圆形
        1 purple square below 1 red square: 图中有一个紫色方块在一个红色方块下面
        4 blue circle right of 1 green triangle: 一张画着四个蓝色圆形位于一个绿色三角形右边的图片"""}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_written_by_hand_are_among_those_told(language):
    told = 0
    for line in re.sub(r";\s+", "; ", EXPECTED[language]).splitlines():
        scene, _, sentences = line.partition(": ")
        possible = every(lambda rng, scene=scene: tellings.tell(parse(scene), language, rng))
        for sentence in sentences.split("; "):
            assert sentence in possible
            told += 1
    assert told >= 12


@pytest.mark.parametrize("language", [*LANGUAGES, "narrative"])
def test_every_scene_reads_back_from_its_caption_and_all_words_agree(language):
    rng, told = random.Random(0), {}
    for i, scene in enumerate(SCENES):
        text = tellings.narrative(scene, rng, unseen=i % 2 == 1) if language == "narrative" else tellings.tell(scene, language, rng)
        assert same(read(text, language)) == same(scene), text
        assert told.setdefault(text, same(scene)) == same(scene)          # no two scenes share a caption


@pytest.mark.parametrize("language, wrong", [
    ("spanish", "una círculo rojo"), ("spanish", "dos círculos rojo"), ("spanish", "una figura circular rojo"), ("german", "ein rote Kreis"),
    ("german", "ein roter Kreis über zwei blaue Quadrate"), ("german", "ein Bild von ein roter Kreis"), ("german", "eine roten Scheibe"),
    ("german", "über einem roten Kreis ist zwei blaue Quadrate"), ("chinese", "二个红色的圆形"), ("english", "two red circle")])
def test_the_reader_of_these_tests_notices_what_is_wrong(language, wrong):
    with pytest.raises(AssertionError):
        read(wrong, language)


CORNER = ("top", "bottom", "left", "right")


def deciding(language):
    """The words that say what the scene is: all but the articles and the frame."""
    words = {word for word, meaning, _ in LEXICON[language] if meaning not in ("1", "-", "open", "close", "verb", "has")}
    if language == "english":
        kin = (w for table in FACTS.values() for ws in table.values() for phrase in ws for w in phrase.split())
        words |= {"one", "single", *CORNER, *kin} - {"a", "an", "the", "in", "on", "at", "of", "to", "side", "like"}
    return words


def has(text, word, language):
    return word in text if language == "chinese" else re.search(rf"\b{re.escape(word)}s?\b", text.lower())


@pytest.mark.parametrize("language", LANGUAGES)
def test_filler_says_nothing_of_any_scene(language):
    for sentence in tellings.FILLER[language]:
        assert not [word for word in deciding(language) if has(sentence, word, language)], sentence


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_paragraph_tells_its_scene_once_and_behind_forty_words(language):
    rng, stop = random.Random(1), "。" if language == "chinese" else "."
    filler = [re.compile(re.sub(r"\\\[.*?\\\]", ".+", re.escape(sentence[:-1]))) for sentence in tellings.FILLER[language]]
    for scene in rng.sample(SCENES, 400):
        text = tellings.paragraph(scene, rng, language=language)
        words = list(text) if language == "chinese" else text.split()
        assert 60 <= len(words) <= 120
        opening = ("" if language == "chinese" else " ").join(words[:40])
        assert not [word for word in deciding(language) if has(opening, word, language)], text
        sentences = [sentence.strip() for sentence in text.split(stop) if sentence]
        told = [sentence for sentence in sentences if not any(pattern.fullmatch(sentence) for pattern in filler)]
        assert len(set(sentences)) == len(sentences)
        if len(told) == 2:
            first = re.fullmatch(r"(?:At the|On the) (top|bottom|left|right) there (is|are) (.*)", told[0])
            second = re.fullmatch(r"(.*) (it|them) there (is|are) (.*)", told[1])
            place = dict(zip(CORNER, RELATIONS))[first[1]]
            back = read(f"one red circle {second[1].lower()} one red square", "english").relation
            a, b = (read(phrase, "english").groups[0] for phrase in (first[3], second[4]))
            assert back == OPPOSITE[place] and (second[2] == "it") == (a.count == 1)
            assert [first[2], second[3]] == ["is" if group.count == 1 else "are" for group in (a, b)]
            assert same(Scene((a, b), place)) == same(scene)
        else:
            assert len(told) == 1 and same(read(told[0][0].lower() + told[0][1:], language)) == same(scene), text


def test_the_length_of_a_paragraph_can_be_chosen():
    rng = random.Random(2)
    for scene in rng.sample(SCENES, 100):
        assert 100 <= len(tellings.paragraph(scene, rng, words=(100, 140)).split()) <= 140


def test_each_fact_has_one_meaning():
    words = Counter(word for table in FACTS.values() for names in table.values() for word in names)
    assert max(words.values()) == 1
    assert all(len(names) >= 4 for kind in ("colour", "shape") for names in FACTS[kind].values())
    assert len({hue.split()[-1] for hue in tellings.HUES}) == len(tellings.HUES)       # 'sky-coloured' has one too
    assert list(FACTS["colour"]) == list(COLOURS) and tuple(FACTS["shape"]) == SHAPES and tuple(FACTS["relation"]) == RELATIONS


def test_all_facts_are_stated():
    rng = random.Random(3)
    told = {line for _ in range(60) for line in tellings.facts(rng)}
    assert {"grass is green", "the colour of the sky is blue", "a brick is a square", "slices of pizza are triangles", "an emerald is green",
            "a wheel has the shape of a circle", "a trio of things means three things", "a lone thing means one thing",
            "to the west of means left of"} <= told
    assert len(tellings.facts(rng)) == sum(len(names) for table in FACTS.values() for names in table.values())
    assert not [line for line in told if re.search(r"\b(a [aeiou]|an [^aeiou])", line)]


def pairs_in(text):
    """The (hue, body) pairs of a narrative."""
    hue = r"(?:the colour of|coloured like) (?P<{0}>(?:an? |the )?\w+)"
    body = "|".join(sorted((form for b in tellings.BODIES for form in (tellings.some(2, b), b)), key=len, reverse=True))
    found = re.finditer(rf"(?:(\w+)-coloured )?\b({body})\b(?: {hue.format('after')})?", text)
    bare = {h.split()[-1]: h for h in tellings.HUES}
    single = {tellings.some(2, b): b for b in tellings.BODIES}
    return [(bare[m[1]] if m[1] else m["after"], single.get(m[2], m[2])) for m in found]


def test_held_out_pairs_never_meet_in_training_while_each_word_does():
    rng, seen, words = random.Random(4), set(), set()
    for scene in SCENES:
        text = tellings.narrative(scene, rng)
        pairs = pairs_in(text)
        assert len(pairs) == len(scene.groups) and not any(tellings.held_out_pair(*pair) for pair in pairs), text
        seen |= set(pairs)
        words |= {name for names in (*FACTS["count"].values(), *FACTS["relation"].values()) for name in names if has(text, name, "english")}
        pairs = pairs_in(tellings.narrative(scene, rng, unseen=True))
        assert sum(tellings.held_out_pair(*pair) for pair in pairs) == 1
    assert {hue for hue, _ in seen} == set(tellings.HUES) and {body for _, body in seen} == set(tellings.BODIES)
    assert words == {name for kind in ("count", "relation") for names in FACTS[kind].values() for name in names}
    held = [pair for pair in product(tellings.HUES, tellings.BODIES) if tellings.held_out_pair(*pair)]
    assert 0.12 < len(held) / 375 < 0.13


def test_narratives_have_right_articles_and_name_no_colour_or_shape():
    rng = random.Random(5)
    for scene in SCENES:
        text = tellings.narrative(scene, rng)
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text), text
        assert not [word for word in (*COLOURS, *SHAPES, "violet", "disc") if has(text, word, "english")], text
    assert {"a trio of balls the colour of grass", "triplet emerald-coloured wheels"} <= every(
        lambda rng: tellings.narrative(parse("3 green circle"), rng))
    assert {"a quartet of slices of pizza coloured like a plum", "a foursome of lavender-coloured tents"} <= every(
        lambda rng: tellings.narrative(parse("4 purple triangle"), rng))
    assert "an aubergine-coloured brick" in every(lambda rng: tellings.narrative(parse("1 purple square"), rng))


def test_a_label_scores_three_for_both_two_for_either_one_for_none():
    scene = parse("3 green circle above 1 blue square")
    scores = {"green circle": 3, "blue square": 3, "green square": 2, "blue circle": 2, "red circle": 2, "blue triangle": 2, "red triangle": 1}
    assert {label: tellings.tag_score(scene, label) for label in scores} == scores
    assert tellings.tag_line("two red circles", "red circle") == "scene: two red circles. red circle:"


def test_tag_examples_are_right_and_their_scores_balanced():
    rng, scores = random.Random(6), Counter()
    for scene in SCENES:
        text = tellings.tag_example(scene, rng)
        caption, label, score = re.fullmatch(r"scene: (.*)\. (\w+ \w+): ([123])", text).groups()
        assert int(score) == tellings.tag_score(scene, label)
        assert caption == shapes.keywords(scene) or same(read(caption, "english")) == same(scene)
        scores[score] += 1
    assert max(scores.values()) - min(scores.values()) < 0.06 * len(SCENES)


def test_the_corpus_has_the_shares_that_it_promises_and_no_held_out_pair():
    rng = random.Random(7)
    scenes = [shapes.random_scene(rng) for _ in range(4000)]
    lines = list(tellings.corpus(scenes, random.Random(8)))
    kinds = Counter()
    for line in lines:
        before, plain, _ = line.partition(" in plain words: ")
        kinds["tag" if line.startswith("scene: ") else "parallel" if line.startswith(tuple(f"{name}: " for name in LANGUAGES)) else
              "fact" if re.search(r"\b(is|are|has|means) ", line) and ". " in line and not plain else
              "paragraph" if len(before.split()) > 50 or "。" in before else "narrative" if plain else "caption"] += 1
        if plain and len(before.split()) < 50:
            assert not any(tellings.held_out_pair(*pair) for pair in pairs_in(before))
    shares = map(int, re.findall(r"\n +(\d+) ", tellings.corpus.__doc__))
    promised = dict(zip(("caption", "parallel", "paragraph", "narrative", "fact", "tag"), shares))
    assert sum(promised.values()) == 100
    assert {kind: pytest.approx(100 * n / len(lines), abs=3) for kind, n in kinds.items()} == promised
    assert lines[:50] == list(islice(tellings.corpus(iter(scenes), random.Random(8)), 50))             # the same seed, the same lines, lazily
    assert not [line for line in lines if "\n" in line]
