"""The generator as a matcher: the score and what it cannot know, tuning, tasks, rivals, a run."""
import argparse
import csv
import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_coco, refused, run, save_run, tiny_pipeline
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import common
import dsd
import encoders
import uvit_fusion
from dsd import Candidates, Config, Matcher, match, noise_bank
from experiments import dsd as rivals
from toy import matching, shapes
from toy.matching import KINDS

CPU = ["--device", "cpu", "--precision", "fp32"]
TUNE = ["--train", "--batch-size", 3, "--steps", 4, "--lora-rank", 2, "--prompts", 2,
        "--evaluations", 2, "--base", "base", "--data", "pairs.jsonl", *CPU]
FRESH = argparse.Namespace(resume=False, overwrite=True)
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory, base):
    """A folder with a random base, twelve labelled pairs, a Winoground group and a tuned run."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(base, folder / "base")
    make_coco(folder / "coco")
    paths = sorted((folder / "coco" / "train2017").iterdir())
    names = [f"coco/train2017/{path.name}" for path in paths]
    pairs = [{"pictures": [name], "texts": [f"a man on a horse, {i}", f"two red circles, {i}"],
              "right": i % 2, "kind": "x"} for i, name in enumerate(names)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    winoground = {"pictures": names[:2], "texts": ["a man on a horse", "a horse on a man"]}
    (folder / "winoground.jsonl").write_text(json.dumps(winoground) + "\n")
    status, _, errors = run("dsd.py", *TUNE, "--out", "run", cwd=folder)
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def groups(world):
    return matching.read_groups(world / "pairs.jsonl")


def make_matcher(pipeline):
    """A matcher whose tuned parameters differ from their initial values."""
    cfg = Config(prompts=2, lora_rank=2, times=(50, 500), evaluations=2)
    matcher = Matcher(cfg, pipeline)
    torch.manual_seed(3)
    for parameter in matcher.tuned().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return matcher.requires_grad_(False)


@pytest.fixture(scope="module")
def matcher(world):
    cpu = torch.device("cpu")
    return make_matcher(uvit_fusion.load_pipeline(world / "base", cpu, torch.float32))


@pytest.fixture(scope="module")
def candidates(matcher, groups):
    return Candidates(groups, matcher.pipeline)


def record(owner, name, monkeypatch):
    """A list that gets the arguments of all calls of a function from now on."""
    calls = []
    function = getattr(owner, name)

    def recording(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)
    monkeypatch.setattr(owner, name, recording)
    return calls


# --------------------------------------------------------------------------------------- the score
def test_words_are_pooled_by_logsumexp_and_by_their_share_and_patches_by_the_mean():
    words = torch.tensor([[0.0, math.log(3)], [math.log(2), math.log(6)]])    # 2 patches x 2 words
    others = torch.tensor([[math.log(12)], [math.log(8)]])                     # a further key
    keys = torch.cat([words, others], dim=-1)
    padded = torch.cat([words, torch.full((2, 3), -math.inf)], dim=-1)
    a = (math.log(4) + math.log(8)) / 2
    b = (math.log(4 / 16) + math.log(8 / 16)) / 2
    for each in (words, padded):
        pooled = dsd.pool_words(each[None, None], keys[None, None])
        assert pooled.shape == (1, 2, 1) and pooled.flatten().tolist() == pytest.approx([a, b])


def score_by_hand(matcher, attentions, mask, mask_text):
    """The equation, a number at a time, from what went into the attention of three joint blocks."""
    heads = matcher.pipeline.cfg.heads
    prompts = len(matcher.prompts)
    scores = torch.zeros(len(mask))
    middle = len(attentions) // 2
    three = [attentions[middle - 1], attentions[middle], attentions[-1]]
    for block, (attention, x, context) in enumerate(three):
        tokens = x if context is None else torch.cat([x, context], dim=1)
        first_word = 1 + prompts if context is None else x.shape[1] + prompts
        seen = torch.ones(len(mask), tokens.shape[1], dtype=torch.bool)
        if mask_text:
            seen[:, first_word:first_word + mask.shape[1]] = mask
        w_q, w_k, _ = attention.qkv.weight.chunk(3)
        q = (x @ w_q.T).unflatten(-1, (heads, -1))                                  # (B, Q, H, d)
        k = (tokens @ w_k.T).unflatten(-1, (heads, -1))                             # (B, K, H, d)
        for i in range(len(mask)):
            words = k[i, first_word:first_word + mask.shape[1]][mask[i]]            # (L, H, d)
            for h in range(heads):
                logits = q[i, -9:, h] @ words[:, h].T / math.sqrt(q.shape[-1])      # 9 patches
                all_logits = q[i, -9:, h] @ k[i, seen[i], h].T / math.sqrt(q.shape[-1])
                a = logits.exp().sum(1).log()
                b = (logits.exp().sum(1) / all_logits.exp().sum(1)).log()
                scores[i] += (matcher.w[:, block, h] @ torch.stack([a, b]).mean(1)) / (3 * heads)
    return scores


@pytest.mark.parametrize("mask_text", [True, False])
@pytest.mark.parametrize("image_blocks", [0, 1])
@pytest.mark.parametrize("fusion", ["concat", "cross"])
def test_the_score_is_its_equation(clip_folder, fusion, image_blocks, mask_text):
    """Queries of patches, keys of words, in three joint blocks: no padding, no learned prompts."""
    matcher = make_matcher(tiny_pipeline(clip_folder, size=24, patch=8, fusion=fusion,
                                         image_blocks=image_blocks, mask_text=mask_text))
    attentions = []

    def note(attention, args):
        x, context = args[:2]
        if context is not None or x.shape[1] > 1 + 9:                     # the text is there: joint
            attentions.append((attention, x, context))
    uvit = matcher.uvit
    for block in [*uvit.in_blocks, uvit.mid_block, *uvit.out_blocks]:
        block.attn.register_forward_pre_hook(note)
    y, mask = matcher.encode_text(["a man", "two red circles above a blue square", ""])
    assert y.shape == (3, 2 + 16, 32) and torch.equal(y[0, :2], matcher.prompts)
    assert mask[:, :2].all() and len(set(mask.sum(1).tolist())) == 3
    x_0, eps = torch.randn(2, 3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    score = matcher(x_0, torch.tensor([30, 400, 900]), eps, y, mask)
    assert len(attentions) == 5 - 2 * image_blocks and score.dtype == torch.float32
    assert_close(score, score_by_hand(matcher, attentions, mask[:, 2:], mask_text), **CLOSE)


def test_a_score_depends_on_its_own_image_and_text_only(matcher, candidates, groups):
    together = match(matcher, candidates, batch_size=7)
    for i in (0, 5, 11):
        alone = match(matcher, Candidates([groups[i]], matcher.pipeline))
        assert_close(together[candidates.members[i]], alone, **CLOSE)
    turned = [group | {"texts": group["texts"][::-1]} for group in groups]
    other = Candidates(turned, matcher.pipeline)
    mirrored = other.tables(match(matcher, other))
    for table, mirror in zip(candidates.tables(together), mirrored):
        np.testing.assert_allclose(table, mirror[:, ::-1], **CLOSE)
    crossed = {"pictures": [group["pictures"][0] for group in groups[:2]],
               "texts": groups[1]["texts"]}             # two images, shared texts
    both = Candidates([crossed], matcher.pipeline)
    table = both.tables(match(matcher, both))[0]
    np.testing.assert_allclose(table[1], together[candidates.members[1]], **CLOSE)


def test_all_candidates_share_t_and_noise_and_the_score_is_the_mean(
        matcher, candidates, monkeypatch):
    first, second = (match(matcher, candidates, [noise]) for noise in matcher.bank)
    calls = record(matcher.uvit, "denoise", monkeypatch)
    score = match(matcher, candidates, batch_size=24)
    assert_close(score, (first + second) / 2, **CLOSE)
    assert len(calls) == 2 and not torch.allclose(first, second, atol=1e-4)
    for (x_t, t, *_), (t_bank, eps) in zip(calls, matcher.bank):
        sqrt_abar, sqrt_one_minus_abar = matcher.pipeline.diffusion.scales(t, x_t)
        x_0 = candidates.x_0[candidates.pairs[:, 0]]
        assert t.tolist() == [t_bank] * 24
        assert_close(x_t, sqrt_abar * x_0 + sqrt_one_minus_abar * eps, rtol=1e-4, atol=1e-4)


def test_the_bank_spans_the_times_and_is_the_same_each_time(matcher):
    bank = noise_bank(matcher.pipeline, (50, 500), 4)
    again = noise_bank(matcher.pipeline, (50, 500), 4)
    assert sorted(int(t) for t, _ in bank) == [50, 200, 350, 500]
    assert all(torch.equal(a, b) for one, two in zip(bank, again) for a, b in zip(one, two))
    assert all(0.8 < eps.std() < 1.2 and eps.shape == (3, 24, 24) for _, eps in bank)
    assert not torch.equal(bank[0][1], bank[1][1])
    assert [int(t) for t, _ in noise_bank(matcher.pipeline, (50, 500), 1)] == [275]


@pytest.mark.parametrize("depth, blocks", [(2, [0, 1, 2]), (6, [2, 3, 6]), (0, [0])])
def test_the_blocks_are_those_of_the_release(clip_folder, depth, blocks):
    """The last joint block of the way down, the middle and the last of the way up."""
    pipeline = tiny_pipeline(clip_folder, depth=depth, image_blocks=0)
    assert dsd.zero_shot(Config(), pipeline).blocks == blocks


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_the_hybrid_adds_the_fall_of_the_whole_error_of_eps(matcher, monkeypatch, target):
    """Off by 0.3 without the text and by 0.1 with it, in each of 3 x 24 x 24 numbers of eps."""
    diffusion = uvit_fusion.Diffusion("cosine", target, clip_x0=False)
    monkeypatch.setattr(matcher.pipeline, "diffusion", diffusion)
    monkeypatch.setattr(matcher, "cfg", Config(score="hybrid"))
    t = torch.tensor([100, 400])
    x_0, eps = torch.randn(2, 2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    sqrt_abar, sqrt_one_minus_abar = diffusion.scales(t, x_0)
    per_eps = {"eps": 1, "v": 1 / sqrt_abar, "x0": sqrt_one_minus_abar / sqrt_abar}[target]
    empty, _ = matcher.encode_text([""])

    def attention_logits(x_t, t, y, mask):
        order = t.argsort()                          # without a text, in any order
        assert_close(x_t[order], diffusion.q_sample(x_0, t[order], eps))
        off = 0.3 if torch.equal(y, empty.expand(2, -1, -1)) else 0.1
        output = diffusion.target_of(x_0, t[order], eps) + off * per_eps
        return None, None, output[order.argsort()]
    monkeypatch.setattr(matcher, "attention_logits", attention_logits)
    monkeypatch.setattr(matcher, "attention", lambda *logits: torch.tensor([5.0, 7.0]))
    y, mask = matcher.encode_text(["a man", "two red circles"])
    fall = 0.2 * (3 * 24 * 24)**0.5                  # 8.31: an L2 norm, not a mean absolute value
    expected = torch.tensor([5.0, 7.0]) + fall
    assert_close(matcher(x_0, t, eps, y, mask), expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(matcher, "cfg", Config(score="attention"))
    assert matcher(x_0, t, eps, y, mask).tolist() == [5.0, 7.0]


def test_the_error_without_a_text_is_evaluated_once_for_each_noisy_image(matcher, monkeypatch):
    x_t = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))[[0, 1, 0, 0]]
    t = torch.tensor([100, 400, 100, 100])
    y, mask = matcher.encode_text([""] * 4)
    _, _, output = matcher.attention_logits(x_t, t, y, mask)
    _, expected = matcher.pipeline.diffusion.predict(output, x_t, t)
    calls = record(matcher.uvit, "denoise", monkeypatch)
    assert_close(matcher.predict_eps_without_text(x_t, t), expected, **CLOSE)
    assert [len(x_t) for x_t, *_ in calls] == [2]


# --------------------------------------------------------------------------- the loss, the training
def test_the_hinge_wants_the_hardest_wrong_candidate_behind_by_the_margin():
    right = torch.tensor([1.0, 1.0, 1.0])
    wrong = torch.tensor([[0.85, 0.9], [0.5, 0.7], [2.0, 0.0]])
    assert dsd.hinge_loss(right, wrong, 0.2).item() == pytest.approx((0.1 + 0.0 + 1.2) / 3)
    assert dsd.hinge_loss(right, wrong, 0.0).item() == pytest.approx((0.0 + 0.0 + 1.0) / 3)


def test_similar_texts_have_most_words_in_common():
    texts = ["a red circle", "a red square", "two dogs", "a Red circle, and more", "red circle",
             "", "."]
    has_word = dsd.count_words(texts)
    assert has_word.sum(1).tolist() == [3, 3, 2, 5, 2, 0, 0]
    assert dsd.most_similar_texts(has_word, 0, 40) == [4, 3, 1, 2, 5, 6], "of ties, the first"
    assert dsd.most_similar_texts(has_word, 0, count=1) == [4]
    assert dsd.most_similar_texts(has_word, 5, count=40) == [0, 1, 2, 3, 4, 6], "0 / 0 counts as 0"


def test_negatives_are_a_groups_own_then_similar_texts_of_other_groups(candidates, monkeypatch):
    counted = record(dsd, "count_words", monkeypatch)
    assert all(further == [] for _, _, further in dsd.hard_negatives(candidates, needed=1))
    assert not counted                                                      # not if none is needed
    examples = dsd.hard_negatives(candidates, needed=3)
    for group, (right, wrong, further) in zip(candidates.groups, examples):
        assert candidates.texts[right[1]] == group["texts"][group["right"]]
        assert [candidates.texts[i] for _, i in wrong] == [group["texts"][1 - group["right"]]]
        assert len(further) == 22 and {image for image, _ in wrong + further} == {right[0]}
        assert not set(group["texts"]) & {candidates.texts[i] for _, i in further}
    assert len(counted) == 1
    batch = dsd.draw_pairs(examples, Config(batch_size=5), random.Random(0))
    assert batch.shape == (5, 4, 2)
    for first, own, *others in batch.tolist():
        wrong, further = next((w, f) for right, w, f in examples if right == first)
        assert own in wrong and all(pair in further for pair in others)


def test_in_training_the_candidates_of_a_group_share_t_and_noise(
        matcher, candidates, tmp_path, monkeypatch):
    cfg = Config(batch_size=3, steps=2, negatives=2, warmup=0)
    tuned = Matcher(cfg, matcher.pipeline)
    calls = record(tuned.uvit, "denoise", monkeypatch)
    dsd.train(cfg, tuned, candidates, tmp_path / "run", FRESH)
    for x_t, t, *_ in calls:
        x_t = x_t.view(3, 3, *x_t.shape[1:])
        t = t.view(3, 3)
        assert (t == t[:, :1]).all() and (x_t == x_t[:, :1]).all()        # one image, three texts
        assert len(t[:, 0].unique()) > 1 and ((t >= 20) & (t <= 400)).all()
    assert not torch.equal(calls[0][1], calls[1][1])


def test_tuning_learns_the_labels_and_leaves_the_base_as_it_is(matcher, candidates, tmp_path):
    base = matcher.pipeline.model
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    cfg = Config(batch_size=12, steps=60, negatives=1, times=(200, 200), lr=0.02, warmup=5)
    tuned = Matcher(cfg, matcher.pipeline)
    start = {name: p.detach().clone() for name, p in tuned.tuned().items()}
    assert {name.split(".")[-1] for name in start} == {"prompts", "w", "A", "B"}
    dsd.train(cfg, tuned, candidates, tmp_path / "run", FRESH)
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    assert float(rows[-1]["right"]) > 0.9
    tables = candidates.tables(match(tuned, candidates))
    assert rivals.verdicts(candidates.groups, tables)["x_R@1"].mean() > 0.9
    changed = [name for name, p in tuned.named_parameters()
               if name in start and not torch.equal(start[name], p)]
    assert {name.split(".")[-1] for name in changed} == {"prompts", "w", "A", "B"}
    frozen = tuned.uvit.state_dict()
    for name, tensor in before.items():
        original = name.replace(".weight", ".parametrizations.weight.original")     # under LoRA
        assert torch.equal(tensor, base.state_dict()[name])
        assert torch.equal(tensor, frozen[name] if name in frozen else frozen[original])


def test_a_new_matcher_without_prompts_is_zero_shot(matcher, candidates):
    new = Matcher(Config(prompts=0), matcher.pipeline)
    base = dsd.zero_shot(Config(), matcher.pipeline)
    assert new.tuned() and not base.tuned()
    assert_close(match(new, candidates), match(base, candidates), **CLOSE)


def test_a_network_that_gives_nan_has_no_scores(matcher, candidates):
    damaged = dsd.zero_shot(Config(), matcher.pipeline)
    damaged.uvit.pos_embed.data[0, 0] = math.nan
    with pytest.raises(common.UserError, match="gives nan, not scores: .*--precision fp32"):
        match(damaged, candidates)


# --------------------------------------------------------------------------------------- the tasks
def test_a_constant_score_gets_nothing():
    pairs = [{"pictures": ["a"], "texts": ["x", "y"], "right": right} for right in (0, 1)]
    for value in (1.0, math.nan, math.inf, -math.inf):
        assert not rivals.verdicts(pairs, [np.full((1, 2), value)] * 2)["R@1"].any()
        won = rivals.verdicts([{}], [np.full((2, 2), value)])
        assert set(won) == {"text", "image", "group"} and not any(w.any() for w in won.values())


@pytest.mark.parametrize("table, text, image", [
    ([[2, 1], [1, 2]], 1, 1), ([[2, 1], [5, 6]], 1, 0), ([[2, 5], [1, 6]], 0, 1),
    ([[1, 2], [2, 1]], 0, 0), ([[2, 1], [2, 1]], 0, 0)])
def test_winoground_wants_both_texts_and_both_images(table, text, image):
    """text: each image, a row, prefers its own text; image: each text, a column, its own image."""
    won = rivals.verdicts([{}], [np.array(table, float)])
    assert (won["text"].item(), won["image"].item()) == (text, image)
    assert won["group"].item() == text * image


def test_verdicts_are_counted_by_kind_and_over_all_pairs():
    ten = {"pictures": ["a"], "texts": list("abcdefghij"), "right": 2, "kind": "ten"}
    won = rivals.verdicts([ten] * 3, [(-np.abs(np.arange(10.0) - i))[None] for i in (2, 0, 9)])
    assert {name: values.tolist() for name, values in won.items()} == {
        "ten_R@1": [1, 0, 0], "ten_R@5": [1, 1, 0]}
    tables = [-np.arange(10.0)[None], np.roll(-np.arange(10.0), 7)[None]]     # third, sixth place
    assert rivals.verdicts([ten] * 2, tables)["ten_R@5"].tolist() == [1, 0]
    kinds = ("verb", "object", "verb")
    pairs = [{"pictures": ["a", "b"], "texts": ["x"], "right": 1, "kind": kind} for kind in kinds]
    won = rivals.verdicts(pairs, [np.array([[0.0], [score]]) for score in (1.0, -1.0, 2.0)])
    assert {name: values.tolist() for name, values in won.items()} == {
        "verb_R@1": [1, 1], "object_R@1": [0], "all": [1, 0, 1]}


def test_retrieval_finds_any_caption_of_an_image_and_the_image_of_a_caption(world):
    groups = rivals.retrieval_groups(world / "coco", 2, 24)
    sizes = [(len(group["pictures"]), len(group["texts"])) for group in groups]
    assert sizes == 2 * ([(1, 10)] + 5 * [(2, 1)])
    image, caption = groups[6:8]                                           # of the second image
    assert image["right"] == [5, 6, 7, 8, 9] and caption["right"] == [1]
    assert caption["texts"] == image["texts"][5:6]
    assert caption["pictures"][1] == image["pictures"][0]
    tables = [np.zeros(size) for size in sizes]
    tables[6][0, 8] = 1
    tables[7][1, 0] = 1
    won = rivals.verdicts(groups, tables)
    assert won["text_R@1"].tolist() == [0, 1]
    assert won["picture_R@1"].tolist() == [0] * 5 + [1] + [0] * 4


def test_each_image_text_and_pair_is_prepared_once(matcher, groups):
    one, two = groups[:2]
    swapped = one | {"texts": one["texts"][::-1]}
    candidates = Candidates([one, two | {"texts": one["texts"]}, swapped], matcher.pipeline)
    assert len(candidates.x_0) == len(candidates.images) == len(candidates.texts) == 2
    assert candidates.pairs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    tables = candidates.tables(torch.arange(4.0))
    assert [table.tolist() for table in tables] == [[[0, 1]], [[2, 3]], [[1, 0]]]


@pytest.mark.parametrize("line", [
    "{", "7", '{"pictures": ["a"]}', '{"pictures": ["a"], "texts": ["x"], "right": 0}',
    '{"pictures": "a", "texts": ["x", "y"], "right": 0}',
    '{"pictures": ["a"], "texts": ["x", "y"], "right": 2}',
    '{"pictures": ["a"], "texts": ["x", "y"], "right": "0"}',
    '{"pictures": ["a"], "texts": ["x", "y"], "right": -1}',
    '{"pictures": ["a"], "texts": ["x", "y"]}',
    '{"pictures": ["a"], "texts": ["x", 3], "right": 0}',
    '{"pictures": ["a", "b"], "texts": ["x", "y"], "right": 0}'])
def test_groups_have_paths_beside_their_file_and_a_line_that_is_none_is_named(tmp_path, line):
    path = tmp_path / "groups.jsonl"
    good = ('{"pictures": ["../b"], "texts": ["x", "y"], "right": 1}\n'
            '{"pictures": ["a", "b"], "texts": ["x", "y"]}\n')
    path.write_text(good)
    one, two = matching.read_groups(path)
    assert one == {"pictures": [str(tmp_path.parent / "b")], "texts": ["x", "y"], "right": 1}
    assert two["pictures"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    path.write_text(good + line + "\n")
    with pytest.raises(common.UserError, match="groups.jsonl, line 3: expected"):
        matching.read_groups(path)


def test_comvg_is_read_with_the_right_image_anywhere(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.jpg")
    others = ("dog,ride,horse", "man,feed,horse", "man, ride, dog")
    lines = ["id,sentence,pos_triplet,neg_triplet,pos_image_id,neg_image_id,neg_value"]
    lines += [f'{i},a man rides a horse,"man,ride,horse","{others[i % 3]}",{i},{i + 10},x'
              for i in range(10)]
    (tmp_path / "comvg.csv").write_text("\n".join(lines))
    groups = rivals.read_comvg(tmp_path / "comvg.csv", tmp_path)
    assert [group["kind"] for group in groups[:3]] == ["subject", "verb", "object"]
    assert {group["right"] for group in groups} == {0, 1}
    for i, group in enumerate(groups):
        right = group["pictures"].pop(group["right"])
        assert right.endswith(f"/{i}.jpg") and group["pictures"][0].endswith(f"/{i + 10}.jpg")


# -------------------------------------------------------------------------------------- the rivals
@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_errors_are_in_the_units_of_eps_or_in_the_networks_own(target):
    """A network that knows its target makes none; an error of 0.1 in it, in units of eps."""
    diffusion = uvit_fusion.Diffusion("cosine", target, clip_x0=False)
    t = torch.tensor([100, 400])
    x_0, eps = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sqrt_abar, sqrt_one_minus_abar = (scale.flatten() for scale in diffusion.scales(t, x_0))
    factor = {"eps": torch.ones(2), "v": sqrt_abar, "x0": sqrt_abar / sqrt_one_minus_abar}[target]
    for off in (0.0, 0.1):
        output = diffusion.target_of(x_0, t, eps) + off
        network = SimpleNamespace(pipeline=SimpleNamespace(diffusion=diffusion),
                                  attention_logits=lambda *_, output=output: (None, None, output))
        inputs = network, x_0, t, eps, None, None
        assert_close(rivals.target_error(*inputs), torch.full((2,), off**2))
        assert_close(rivals.noise_error(*inputs), (off * factor)**2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("error", [rivals.noise_error, rivals.target_error])
def test_the_rivals_are_errors_with_and_without_the_text(matcher, candidates, error):
    pairs = len(candidates.pairs)
    images = len(candidates.x_0)
    mean = torch.zeros(2, pairs)                                           # with the text, without
    for i, (image, text) in enumerate(candidates.pairs.tolist()):
        x_0 = candidates.x_0[image][None]
        for k, words in enumerate([candidates.texts[text], ""]):
            for t, eps in matcher.bank:
                y, mask = matcher.encode_text([words])
                mean[k, i] += error(matcher, x_0, t[None], eps[None], y, mask).item() / 2
    for rival, expected, evaluations in (
            (rivals.denoising, -mean[0], 2 * pairs),
            (rivals.itm, mean[1] - mean[0], 2 * (pairs + images))):
        scores, spent = rival(matcher, candidates, matcher.bank, error)
        assert spent == evaluations
        assert_close(scores, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(mean[0], mean[1], atol=1e-4)


def test_pruning_drops_what_is_surely_behind_and_spends_less(candidates, monkeypatch):
    """Wrong candidates of even groups err far more, those of odd ones differ only by chance."""
    spent = []

    def errors(matcher, candidates, bank, error):
        rows = candidates.pairs[:, 1]                                      # each has its own text
        spent.append(len(rows))
        noise = 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(len(spent)))
        return torch.where(torch.arange(24) % 4 == 1, 9.0, 1.0)[rows] + noise[rows]
    monkeypatch.setattr(dsd, "match", errors)
    scores, evaluations = rivals.pruned_denoising(None, candidates, [None] * 12, None)
    assert spent[:4] == [24] * 4 and 6 <= max(spent[4:]) <= 12 and evaluations == sum(spent)
    tables = candidates.tables(scores)
    assert all(table[0, 0] > table[0, 1] == -math.inf for table in tables[0::2])
    assert all(-1.2 < table.max() < -0.8 for table in tables)              # a mean, not a sum


def test_clip_is_tuned_by_its_own_loss_and_the_first_one_stays(clip_folder, candidates):
    clip = encoders.ClipScorer(clip_folder)
    scores, evaluations = rivals.clip_scores(clip, candidates)
    images = candidates.images[candidates.pairs[:, 0]].permute(0, 2, 3, 1)
    texts = [candidates.texts[i] for i in candidates.pairs[:, 1].tolist()]
    assert evaluations == 0
    assert_close(scores, (clip.images(images) * clip.texts(texts)).sum(-1), **CLOSE)
    tuned = rivals.tune_clip(clip, candidates, steps=40, batch_size=12, lr=3e-3)
    assert_close(rivals.clip_scores(clip, candidates)[0], scores)
    after, _ = rivals.clip_scores(tuned, candidates)
    assert rivals.verdicts(candidates.groups, candidates.tables(after))["x_R@1"].mean() > 0.9


def test_lora_is_on_the_feed_forward_layers_unless_as_published(matcher):
    for cfg in (Config(), Config(lora_mlp=False), Config(**dsd.PRESETS["paper"])):
        tuned = Matcher(cfg, matcher.pipeline).tuned()
        on_attention = [name for name in tuned if ".attn." in name]
        on_mlp = [name for name in tuned if ".mlp." in name]
        assert on_attention
        assert len(on_mlp) == (len(on_attention) if cfg.lora_mlp else 0)
    assert Config().lora_mlp and not Config(**dsd.PRESETS["paper"]).lora_mlp


# ------------------------------------------------------------------------------------------- a run
def test_a_run_holds_only_what_was_tuned_and_names_what_it_stands_on(world, matcher):
    tensors = load_file(world / "run" / "model.safetensors")
    config = json.loads((world / "run" / "config.json").read_text())
    tuned = Matcher(Config(prompts=2, lora_rank=2), matcher.pipeline).tuned()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: parameter.shape for name, parameter in tuned.items()}
    assert config["base"] == "base" and config["base_identity"] == matcher.pipeline.identity()
    header = (world / "run" / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,loss,right"


def test_a_resumed_tuning_equals_an_uninterrupted_one(
        world, matcher, candidates, tmp_path, monkeypatch):
    cfg = common.read_config(Config, world / "run")
    calls = record(dsd, "hinge_loss", monkeypatch)
    save = common.Run.save

    def save_and_stop_at_2(run, step):
        run.stopped = step == 2
        save(run, step)
    monkeypatch.setattr(common.Run, "save", save_and_stop_at_2)
    monkeypatch.setattr(common.Run, "due", lambda run, step: step in (2, cfg.steps))
    with pytest.raises(SystemExit):
        dsd.train(cfg, Matcher(cfg, matcher.pipeline), candidates, tmp_path / "cut", FRESH)
    assert len(calls) == 2
    status, _, errors = run("dsd.py", *TUNE, "--resume", "--out", tmp_path / "cut", cwd=world)
    assert status == 0 and len(calls) == 4, errors
    resumed = load_file(tmp_path / "cut" / "model.safetensors")
    for name, tensor in load_file(world / "run" / "model.safetensors").items():
        assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_is_loaded_with_what_was_tuned_or_without(world, monkeypatch):
    monkeypatch.chdir(world)
    tensors = load_file("run/model.safetensors")
    flags = argparse.Namespace(device="cpu", precision="fp32")
    tuned = dsd.load_matcher("run", flags)
    state = tuned.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    base = dsd.zero_shot(tuned.cfg, tuned.pipeline)
    assert len(base.prompts) == 0 and base.w.mean((1, 2)).tolist() == [1, 0]
    assert not tuned.tuned()
    assert set(base.uvit.state_dict()) == set(tuned.pipeline.model.state_dict())


def test_on_a_gpu_a_matcher_is_tuned_and_matches(tmp_path, base, pretended_gpu):
    shapes.build(tmp_path / "data" / "shapes", 24, train=60, val=80)
    matching.build_matching(tmp_path / "data" / "shapes", 24, train=8, test=2, others=2)
    shutil.copytree(base, tmp_path / "base")
    retrieval = ["--retrieval", "shapes", "--pool-size", 4]
    for script, *flags in (
            ("dsd.py", "--train", "--base", "base", "--shots", 8, "--steps", 2, "--batch-size", 2,
             "--evaluations", 1),
            ("dsd.py", "data/shapes/val2017/000000000001.png", "two red circles", "a red circle"),
            ("experiments.dsd", "grade", *retrieval, "--score", "hybrid"),
            ("experiments.dsd", "grade", *retrieval, "--score", "itm", "--evaluations", 2)):
        status, _, errors = run(script, *flags, cwd=tmp_path)
        assert status == 0, errors


def test_texts_are_ranked_for_an_image_and_drawn(world, tmp_path):
    image = "coco/val2017/000000000001.jpg"
    status, out, errors = run("dsd.py", image, "a man on a horse", "two red circles", "x",
                              "--run", "run", "--out", tmp_path / "map.png", *CPU, cwd=world)
    assert status == 0, errors
    lines = [line for line in out.splitlines() if line.startswith(("a man", "two red", "x "))]
    scores = [float(line.split()[-1]) for line in lines]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert Image.open(tmp_path / "map.png").width > 5 * 144


@pytest.mark.parametrize("name", ["base", "base/model.safetensors"])
def test_a_run_that_draws_ranks_zero_shot(world, tmp_path, monkeypatch, name):
    matchers = record(dsd, "match", monkeypatch)
    status, out, errors = run("dsd.py", "coco/val2017/000000000001.jpg", "a man on a horse", "x",
                              "--run", name, "--out", tmp_path / "map.png", *CPU, cwd=world)
    assert status == 0 and "a man on a horse" in out, errors
    assert not matchers[0][0].cfg.lora_rank


def test_words_have_the_tokens_that_spell_them(matcher):
    tokenizer = matcher.pipeline.text_encoder.tokenizer
    text = "two zebras above a blue square"
    ids = tokenizer(text).input_ids
    found = dsd.find_words(tokenizer, text, 16)
    assert len(found) > 3
    for word, tokens in found:
        assert tokenizer.decode([ids[i] for i in tokens]).strip() == word
    assert len(dsd.find_words(tokenizer, text, 4)) < 6
    assert dsd.find_words(tokenizer, "", 16) == [("", [])]


def test_maps_are_shares_of_the_attention_of_each_patch(matcher, candidates):
    maps = dsd.attention_maps(matcher, candidates.x_0[:1], "a man on a horse")
    words = matcher.encode_text(["a man on a horse"])[1].sum() - len(matcher.prompts)
    assert maps.shape == (3, 3, 16) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    assert (maps[..., :words] > 0).all() and (maps[..., words:] == 0).all()


@pytest.mark.parametrize("flags, words", [
    (["--groups", "pairs.jsonl", "--run", "run"], ["attention, tuned", "12 groups",
                                                   "48 network evaluations"]),
    (["--groups", "pairs.jsonl", "--run", "run", "--score", "hybrid", "--evaluations", 1],
     ["hybrid, tuned", "36 network evaluations"]),
    (["--groups", "pairs.jsonl", "--run", "run", "--score", "itm", "--times", 600, 800],
     ["itm, zero-shot", "360 network evaluations"]),
    (["--groups", "winoground.jsonl", "--run", "base", "--score", "denoising"],
     ["denoising, zero-shot", "text", "image", "group"]),
    (["--retrieval", "coco", "--pool-size", 2, "--run", "base"],
     ["attention, zero-shot", "text_R@5", "picture_R@1"])])
def test_every_task_is_graded_by_every_score(world, flags, words):
    status, out, errors = run("experiments.dsd", "grade", *flags, *CPU, cwd=world)
    assert status == 0 and all(word in out for word in words), errors + out


def test_the_toy_world_is_tuned_on_graded_and_compared_from_end_to_end(tmp_path, clip_folder):
    shapes.build(tmp_path / "data" / "shapes", 24, train=60, val=80)
    matching.build_matching(tmp_path / "data" / "shapes", 24, train=8, test=2, others=2)
    save_run(tiny_pipeline(clip_folder, size=24, patch=8), tmp_path / "base")
    status, out, errors = run("dsd.py", "--train", "--base", "base", "--shots", 8, "--steps", 2,
                              "--batch-size", 2, "--evaluations", 1, *CPU, cwd=tmp_path)
    assert status == 0 and "attention, tuned" in out, errors
    heading = next(line for line in out.splitlines() if line.startswith("right, %"))
    assert heading.split() == [
        "right,", "%", "evaluations", *KINDS, "all", "+-", "two", "images", "+-"]
    folder = tmp_path / "runs" / "dsd"
    figures = json.loads((folder / "results.json").read_text())
    names = {"accuracy", "accuracy_ci", "zero_shot", "relation_zero_shot", "seconds"}
    names |= set(KINDS) | {f"zero_shot_{kind}" for kind in KINDS}
    names |= {"one_text_two_pictures", "one_text_two_pictures_ci"}
    assert names <= set(figures)
    assert figures["evaluations"] == figures["zero_shot_evaluations"] == 2
    assert (folder / "samples" / "attention.png").stat().st_size > 0
    status, out, errors = run("experiments.dsd", "compare", "--others", 2, *CPU, cwd=tmp_path)
    assert status == 0 and all(label in out for label in rivals.LABELS.values()), errors
    compared = json.loads((folder / "results.json").read_text())
    names |= {*rivals.LABELS, "clip_relation", "denoising_evaluations", "relation_over_clip",
              "over_clip_few_shot", "ten_itm_R@5", "winoground_accuracy_group",
              "pictures_hybrid_R@1", "hybrid_tuned_ci", "denoising_own_units_ci",
              "hybrid_tuned_one_text_two_pictures"}
    assert names <= set(compared) and compared["accuracy"] == figures["accuracy"]
    assert compared["hybrid_evaluations"] == 3 and compared["clip_evaluations"] == 0


def test_another_base_is_refused(world, tmp_path):
    for name in ("base", "run", "coco"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.copy(world / "pairs.jsonl", tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    common.save_tensors(tensors | {"norm.bias": tensors["norm.bias"] + 1}, weights)
    refused(run("experiments.dsd", "grade", "--groups", "pairs.jsonl", "--run", "run", *CPU,
                cwd=tmp_path), "run/ was tuned for another network", "--train")
    refused(run("dsd.py", *TUNE, "--resume", "--out", "run", cwd=tmp_path),
            "run/ was started with base_identity")


@pytest.mark.parametrize("script, flags, words", [
    ("dsd.py", ["nowhere.png", "a", "--run", "run"], ["nowhere.png cannot be read"]),
    ("dsd.py", ["nowhere.png", "--run", "run"], ["texts to rank"]),
    ("dsd.py", ["nowhere.png", "a", " ", "--run", "run"], ["none of them empty"]),
    ("dsd.py", ["a.png", "a", "--run", "run", "--base", "base"], ["--base has no effect"]),
    ("dsd.py", ["a.png", "a", "--run", "run", "--resume"], ["--resume has no effect"]),
    ("dsd.py", [*TUNE, "--out", "new", "--run", "run"], ["--run has no effect"]),
    ("dsd.py", [*TUNE, "--out", "new", "--samples", 8], ["--samples has no effect"]),
    ("dsd.py", ["a.jpg", "a man", *TUNE, "--out", "new"], ["--train or a picture"]),
    ("dsd.py", [*TUNE, "--out", "run"], ["run/ already holds a run"]),
    ("dsd.py", [*TUNE, "--out", "new", "--times", 500, 50], ["--times 500 50"]),
    ("dsd.py", [*TUNE, "--out", "new", "--evaluations", 0], ["expected 1 to 1000"]),
    ("dsd.py", [*TUNE, "--out", "new", "--negatives", 30], ["--negatives 30"]),
    ("dsd.py", [*TUNE, "--out", "new", "--prompts", 0, "--lora-rank", 0, "--no-head-weights"],
     ["there is nothing to tune"]),
    ("dsd.py", [*TUNE, "--out", "new", "--data", "winoground.jsonl"], ["no group with a right"]),
    ("dsd.py", [*TUNE, "--out", "new", "--base", "nowhere"], ["nowhere"]),
    ("experiments.dsd", ["grade", "--groups", "nowhere.jsonl", "--run", "run"], ["nowhere.jsonl"]),
    ("experiments.dsd", ["grade", "--groups", "pairs.jsonl", "--run", "nowhere"],
     ["no run in nowhere/", "--train"]),
    ("experiments.dsd", ["compare", "--run", "base"], ["base/: name a run that was tuned"]),
    ("experiments.dsd", ["compare", "--run", "run"], ["run/: name a run that was tuned"]),
    ("experiments.dsd", ["grade", "--comvg", "nowhere.csv", ".", "--run", "run"], ["nowhere.csv"]),
    ("experiments.dsd", ["grade", "--comvg", "pairs.jsonl", ".", "--run", "run"],
     ["--comvg pairs.jsonl"])])
def test_slips_end_in_one_line(world, script, flags, words):
    refused(run(script, *flags, *CPU, cwd=world), *words)
    assert not (world / "new").exists()
