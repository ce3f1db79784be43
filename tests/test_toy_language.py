"""Scenes in other words: the grammar is right, and each text means its scene."""
import json
import random
import re
from collections import Counter
from itertools import product

import pytest

from toy import language, shapes
from toy.language import ALL_BODIES, ALL_HUES, BODIES, COUNTS, HUES, LANGUAGES, PLACES
from toy.shapes import COLOURS, OPPOSITE, RELATIONS, SHAPES, Group, Scene

GROUPS = [Group(*fields) for fields in product(range(1, 5), COLOURS, SHAPES)]
PAIRS = [Scene((a, b), relation) for a, b, relation in product(GROUPS, GROUPS, RELATIONS)]
SCENES = [Scene((group,)) for group in GROUPS] + [s for s in PAIRS if shapes.is_possible(s)]


def scene_of(text):
    """'3 green circle above 1 blue square' as a scene."""
    found = re.findall(r"(\d) (\w+) (\w+)", text)
    relation = next((relation for relation in RELATIONS if relation in text), None)
    return Scene(tuple(Group(int(n), colour, shape) for n, colour, shape in found), relation)


def turned(scene):
    return Scene(scene.groups[::-1], OPPOSITE.get(scene.relation))


class Choices:
    """A random generator that follows a path of choices and notes the paths not taken."""
    def __init__(self, path):
        self.path = path
        self.made = 0
        self.others = []

    def choice(self, options):
        options = sorted(set(options))
        if self.made == len(self.path):
            self.others += [[*self.path, i] for i in range(1, len(options))]
            self.path = [*self.path, 0]
        self.made += 1
        return options[self.path[self.made - 1]]

    def choices(self, options, weights):
        return [self.choice(options)]

    def random(self):
        return self.choice((0.1, 0.9))


def all_texts(text_of, *args, **kwargs):
    """Every text that text_of(*args, rng, **kwargs) can return."""
    texts, paths = set(), [[]]
    while paths:
        rng = Choices(paths.pop())
        texts.add(text_of(*args, rng=rng, **kwargs))
        paths += rng.others
    return texts


# --------------------------------------------------------------------------------------- languages
@pytest.mark.parametrize("name, scene, sentences", [
    ("english", "3 green circle above 1 blue square", """
        three green circles above a blue square;
        a picture of a single blue square beneath 3 green discs;
        over a blue square are three green circles"""),
    ("spanish", "3 green circle above 1 blue square", """
        sobre un cuadrado azul hay tres discos verdes;
        tres círculos verdes encima de un cuadrado azul;
        una imagen de una figura cuadrada azul debajo de 3 círculos verdes"""),
    ("german", "1 red circle above 2 blue square", """ein roter Kreis über zwei blauen Quadraten;
        zwei blaue Quadrate unter einem roten Kreis;
        ein Bild von zwei blauen Quadraten unterhalb von einer roten Scheibe;
        über zwei blauen Quadraten befindet sich ein roter Kreis;
        unterhalb von einer roten Scheibe sind zwei blaue Quadrate"""),
    ("chinese", "3 green circle above 1 blue square", """三个绿色的圆形在一个蓝色的正方形上方;
        一个蓝色的正方形在三个绿色的圆形下方; 一个蓝色的正方形上面有三个绿色的圆形;
        一张三个绿色的圆形在一个蓝色的正方形上方的图片"""),
    ("french", "3 green circle above 1 blue square", """
        trois cercles verts au-dessus d'un carré bleu;
        un dessin d'un carré bleu sous 3 disques verts;
        au-dessus d'un carré bleu il y a trois disques verts"""),
    ("italian", "1 red circle left of 2 yellow square", """
        un cerchio rosso a sinistra di due quadrati gialli;
        un'immagine di 2 quadrati gialli a destra di un solo disco rosso;
        a sinistra di due quadrati gialli c'è un disco rosso;
        a destra di un cerchio rosso ci sono 2 quadrati gialli"""),
])
def test_sentences_written_by_hand_are_among_the_captions(name, scene, sentences):
    possible = all_texts(language.tell, scene_of(scene), name)
    assert {sentence.strip() for sentence in sentences.split(";")} < possible


@pytest.mark.parametrize("name, group, dative, phrases", [
    ("spanish", "1 yellow square", False, """un cuadrado amarillo; un solo cuadrado amarillo;
        una figura cuadrada amarilla; una sola figura cuadrada amarilla"""),
    ("spanish", "3 red circle", False, """tres círculos rojos; 3 círculos rojos; tres discos rojos;
        3 discos rojos; tres figuras circulares rojas; 3 figuras circulares rojas"""),
    ("german", "1 yellow circle", False, """ein gelber Kreis; ein einzelner gelber Kreis;
        eine gelbe Scheibe; eine einzelne gelbe Scheibe"""),
    ("german", "1 yellow circle", True, """einem gelben Kreis; einem einzelnen gelben Kreis;
        einer gelben Scheibe; einer einzelnen gelben Scheibe"""),
    ("german", "2 purple triangle", False, """zwei violette Dreiecke; 2 violette Dreiecke;
        zwei lila Dreiecke; 2 lila Dreiecke"""),
    ("german", "2 green square", True, "zwei grünen Quadraten; 2 grünen Quadraten"),
    ("chinese", "2 red triangle", False, """两个红色三角形; 两个红色的三角形; 2个红色三角形;
        2个红色的三角形"""),
])
def test_these_are_all_the_phrases_for_a_group(name, group, dative, phrases):
    possible = all_texts(language.PHRASES[name], language.WORDS[name], scene_of(group).groups[0],
                         dative=dative)
    assert possible == {phrase.strip() for phrase in phrases.split(";")}


@pytest.mark.parametrize("name", [*LANGUAGES, *language.UNSEEN_LANGUAGES, "narrative", "plain"])
def test_no_two_scenes_share_a_text(name):
    rng = random.Random(0)
    seen = {}
    for scene in SCENES:
        if name == "narrative":
            text = language.narrative(scene, rng)
        elif name == "plain":
            text = language.plain(scene)
            assert text == language.plain(turned(scene))
        else:
            text = language.tell(scene, name, rng)
        same = {scene, turned(scene)}
        assert seen.setdefault(text, same) == same, text


# -------------------------------------------------------------------------------------- long texts
@pytest.mark.parametrize("name", LANGUAGES)
def test_a_paragraph_tells_its_scene_behind_forty_words_of_filler(name):
    filler = [re.sub(r"\\\[.*?\\\]", ".+", re.escape(text[:-1])) for text in language.FILLER[name]]
    scene = scene_of("3 green circle above 1 blue square")
    captions = {text.lower() for text in all_texts(language.tell, scene, name)}
    if name == "english":
        pairs = all_texts(language.two_sentences, scene)
        assert "At the top there are 3 green discs. Below them there is a blue square." in pairs
        assert "At the bottom there is one blue square. Over it there are 3 green discs." in pairs
        captions |= {text.lower().removesuffix(".") for text in pairs}
    for seed in range(100):
        text = language.paragraph(scene, random.Random(seed), language=name)
        assert 60 <= language.length(text, name) <= 120
        sentences = re.split(r"\. |\.$|。", text)[:-1]
        own = [s for s in sentences if not any(re.fullmatch(pattern, s) for pattern in filler)]
        assert ". ".join(own).lower() in captions
        assert language.length(text[:text.index(own[0])], name) >= 40


# ------------------------------------------------------------------------------------ common sense
COLOUR_OF = {hue: colour for colour, hues in HUES.items() for hue in hues}
SHAPE_OF = {body: shape for shape, bodies in BODIES.items() for body in bodies}


def pairs_in(text):
    """The (hue, body) pairs of a narrative."""
    forms = {form: body for body in ALL_BODIES for form in (body, language.inflect(body, 2))}
    hues = {hue.split()[-1]: hue for hue in ALL_HUES}
    body = "|".join(sorted(forms, key=len, reverse=True))
    like = "(?:the colour of|coloured like) (?:an? |the )?"
    found = re.findall(rf"(?:(\w+)-coloured )?\b({body})\b(?: {like}(\w+))?", text)
    return [(hues[before or after], forms[noun]) for before, noun, after in found]


def test_each_word_has_one_meaning():
    words = [word for table in (COUNTS, HUES, BODIES, PLACES)
             for names in table.values() for word in names]
    assert len(set(words)) == len(words)
    assert len({hue.split()[-1] for hue in ALL_HUES}) == 25            # 'sky-coloured' is clear too


def test_a_narrative_paraphrases_every_word_of_its_scene():
    rng = random.Random(3)
    for scene in SCENES[::3]:
        text = language.narrative(scene, rng)
        meant = Counter((COLOUR_OF[hue], SHAPE_OF[body]) for hue, body in pairs_in(text))
        assert meant == Counter((group.colour, group.shape) for group in scene.groups)
        assert not re.search(rf"\b({'|'.join((*COLOURS, *SHAPES))})", text)
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", text)
        assert len(re.findall(r"\w+|[^\w\s]", text)) <= 18
    texts = all_texts(language.narrative, scene_of("3 green triangle"))
    assert {"a trio of tents the colour of grass", "triplet emerald-coloured sails",
            "a triad of slices of pizza coloured like a leaf"} <= texts
    scene = scene_of("3 green circle above 1 blue square")
    texts = {language.narrative(scene, rng, turn=False) for _ in range(1000)}
    assert not any(text.find(place) >= 0 for text in texts for place in PLACES["below"])
    for text in texts:
        place_first = text.startswith(PLACES["above"])
        assert (SHAPE_OF[pairs_in(text)[0][1]] == "square") == place_first


def test_held_out_pairs_never_meet_in_training_while_each_word_does():
    rng = random.Random(4)
    seen = {pair for scene in SCENES for pair in pairs_in(language.narrative(scene, rng))}
    assert {hue for hue, _ in seen} == set(ALL_HUES)
    assert {body for _, body in seen} == set(ALL_BODIES)
    held_out = {pair for pair in product(ALL_HUES, ALL_BODIES) if language.held_out_pair(*pair)}
    assert 0.12 < len(held_out) / 375 < 0.13
    assert not seen & held_out
    prompts = language.narrative_prompts(SCENES[:500])
    assert all(len(held_out.intersection(pairs_in(text))) == 1 for text in prompts)
    assert not any(language.UNHEARD & {*pair} for text in prompts for pair in pairs_in(text))
    assert prompts == language.narrative_prompts(SCENES[:500])


def test_unheard_words_are_one_for_each_colour_and_shape_and_stand_in_one_group():
    assert len(language.UNHEARD) == len(COLOURS) + len(SHAPES)
    assert {"moss", "button"} < language.UNHEARD
    words = set()
    for text in language.narrative_prompts(SCENES[:500], "unheard"):
        unheard = [language.UNHEARD & {*pair} for pair in pairs_in(text)]
        assert sum(map(bool, unheard)) == 1, text
        assert not any(language.held_out_pair(*pair) for pair in pairs_in(text))
        words.update(*unheard)
    assert len(words) > 4


def test_a_narrative_and_its_keywords_tell_the_groups_in_the_same_order():
    scene = scene_of("3 green circle above 1 blue square")
    orders = set()
    for seed in range(40):
        text, prompt = language.narrative_and_keywords(scene, random.Random(seed))
        first = prompt.split(",")[0]
        orders.add(first)
        place_first = text.startswith((*PLACES["above"], *PLACES["below"]))
        assert (COLOUR_OF[pairs_in(text)[0][0]] == first) != place_first
    assert orders == {"green", "blue"}


@pytest.mark.parametrize("split, plain", [("train", (15, 45)), ("val", (0, 0))])
def test_narratives_are_written_with_their_keyword_prompts(tmp_path, split, plain):
    folder = shapes.build(tmp_path / "world", train=100, val=20)
    (folder / "train2017" / "metadata.jsonl").write_text("of an older version")
    language.build_narratives(folder, texts=30)
    texts = (folder / "train2017" / "narratives.txt").read_text().splitlines()
    assert len(texts) == 30
    assert all(any(language.UNHEARD & {*pair} for pair in pairs_in(text)) for text in texts)
    path = folder / f"{split}2017" / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    content = json.loads((folder / "annotations" / f"captions_{split}2017.json").read_text())
    narratives = [(line, image) for line, image in zip(lines, content["images"])
                  if line["text"] != line["prompt"]]
    assert plain[0] <= len(lines) - len(narratives) <= plain[1]
    for line, image in narratives:
        scene = Scene.from_json(image["scene"])
        pairs = pairs_in(line["text"])
        assert line["file_name"] == image["file_name"]
        assert sum(language.held_out_pair(*pair) for pair in pairs) == (split == "val")
        assert not any(language.UNHEARD & {*pair} for pair in pairs)
        assert line["prompt"] in (shapes.keywords(scene), shapes.keywords(turned(scene)))


# ------------------------------------------------------------------------------- what the LLM reads
def test_a_label_scores_three_for_both_two_for_either_one_for_none():
    scores = {"green circle": 3, "blue square": 3, "green square": 2, "red circle": 2,
              "red triangle": 1}
    scene = scene_of("3 green circle above 1 blue square")
    assert {label: language.tag_score(scene, label) for label in scores} == scores
    counts = Counter()
    for seed in range(100):
        text = language.tag_example(scene, random.Random(seed))
        found = re.findall(r"\. (\w+ \w+): ([123])", text)
        assert text.startswith("scene: ") and len(found) == 8
        for label, score in found:
            assert int(score) == language.tag_score(scene, label)
            counts[score] += 1
    assert min(counts.values()) > 250


def test_the_corpus_has_its_shares_and_no_held_out_pair():
    rng = random.Random(7)
    scenes = [shapes.random_scene(rng) for _ in range(3000)]
    kinds = Counter()
    for scene in scenes:
        line = language.corpus_line(scene, rng)
        before, explained, _ = line.partition(" in plain words: ")
        pairs = pairs_in(before) if explained else []
        assert not any(language.held_out_pair(*pair) for pair in pairs)
        kind = "paragraph" if explained else "facts" if ". " in line else "caption"
        if line.split()[0].endswith(":"):
            kind = "tag" if line.startswith("scene:") else "parallel"
        kinds["narrative" if pairs else kind] += 1
    shares = {kind: pytest.approx(n / 30, abs=3) for kind, n in kinds.items()}
    assert language.SHARES == shares


def test_the_instructed_llm_reads_narratives_with_their_keyword_prompts_and_the_corpus():
    rng = random.Random(7)
    scenes = [shapes.random_scene(rng) for _ in range(1000)]
    found = set()
    narratives = 0
    for scene in scenes:
        line = language.instructed_line(scene, rng)
        text, explained, meaning = line.partition(". in plain words: ")
        if explained and meaning in (shapes.keywords(scene), shapes.keywords(turned(scene))):
            narratives += 1
            found.update(word for pair in pairs_in(text) for word in pair)
            assert not any(language.held_out_pair(*pair) for pair in pairs_in(text))
    assert 660 < narratives < 790                 # 70 % of them, and a few of the corpus
    assert found == {*ALL_HUES, *ALL_BODIES}
