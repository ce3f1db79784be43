"""The generator as a matcher: what the score is and what it cannot know, what is tuned, the rivals, the tasks, and a run from end to end."""
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import make_coco, run
from PIL import Image
from safetensors.torch import load_file
from test_llm_adapter import randomized
from test_training import TINY, refused
from test_uvit_fusion import SMALL, inputs, network

import common
import dsd
import eval as grade
import sample
from common import add_lora, merge_lora
from dsd import Candidates, Matcher, Settings, alike, bank, evaluate, examples, hinge, pool, scores, untuned, words
from toy import shapes
from toy.matching import build_matching

FLAGS = ["--device", "cpu", "--precision", "fp32"]
TUNE = ["--train", "--batch", 3, "--steps", 4, "--lora-rank", 2, "--prompts", 2, "--evaluations", 2, "--base", "base", "--data", "pairs.jsonl",
        *FLAGS]


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder):
    """A folder with a base of random weights, labelled pairs, and a tuned run."""
    folder = tmp_path_factory.mktemp("world")
    make_coco(folder / "coco")
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "coco", "--clip", clip_folder, "--steps", 2, "--out", "base", *TINY, cwd=folder)
    assert status == 0, errors
    tensors = load_file(folder / "base" / "model.safetensors")              # blocks that do something, and so attention that says something
    generator = torch.Generator().manual_seed(0)
    common.save_tensors({name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()},
                        folder / "base" / "model.safetensors")
    pictures = sorted((folder / "coco" / "train2017").iterdir())
    pairs = [{"pictures": [f"coco/train2017/{path.name}"], "texts": [f"a man on a horse, {i}", f"two red circles, {i}"], "right": i % 2, "kind": "x"}
             for i, path in enumerate(pictures)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "winoground.jsonl").write_text(json.dumps({"pictures": [f"coco/train2017/{path.name}" for path in pictures[:2]],
                                                         "texts": ["a man on a horse", "a horse on a man"]}) + "\n")
    status, _, errors = run("dsd.py", *TUNE, "--out", "run", cwd=folder)
    assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def painter(world):
    return sample.load_run(world / "base", "cpu", "fp32")


def read(world, file="pairs.jsonl"):
    return grade.read_groups(world / file)


def matcher_of(painter, **change):
    """A matcher whose tuned parameters are not those that it begins with."""
    matcher = Matcher(Settings(**dict(prompts=2, lora_rank=2) | change), painter)
    generator = torch.Generator().manual_seed(3)
    for parameter in matcher.tuned().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return matcher


# -------------------------------------------------------------------------------------------------------------- the score
def test_the_score_is_logsumexp_over_words_and_mean_over_patches():
    g = torch.Generator().manual_seed(0)
    logits, q, k = torch.randn(2, 3, 5, 4, generator=g), torch.randn(2, 3, 5, 8, generator=g), torch.randn(2, 3, 4, 8, generator=g)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    for i, n in enumerate((2, 4)):
        part = logits[i, :, :, :n]
        cosine = torch.cosine_similarity(q[i, :, :, None], k[i, :, None, :n], dim=-1)
        expected = {"lse": part.exp().sum(-1).log().mean(-1), "mean": part.mean((1, 2)), "max": part.amax(-1).mean(-1), "cosine": cosine.mean((1, 2))}
        for how, value in expected.items():
            assert torch.allclose(pool(how, logits, q, k, mask)[i], value, atol=1e-5), how
    assert pool("lse", logits.bfloat16(), q, k, mask).dtype == torch.float32


@pytest.mark.parametrize("fusion", ["concat", "cross"])
@pytest.mark.parametrize("blocks", [0, 1])
def test_the_logits_are_those_of_patches_and_words(fusion, blocks):
    """Seen from outside: they change with the words, and the columns of padding are -inf."""
    model, (x, t, text, mask) = network(fusion=fusion, image_blocks=blocks), inputs(SMALL)
    randomized(model)
    matcher = Matcher.__new__(Matcher)
    torch.nn.Module.__init__(matcher)
    matcher.network, matcher.prompts, matcher.joint = model, torch.nn.Parameter(torch.randn(2, 32)), range(blocks, 5 - blocks)
    matcher.painter = type("Painter", (), {"device": torch.device("cpu"), "precision": torch.float32})
    y, seen = matcher.read(text, mask)
    assert y.shape == (3, 7, 32) and torch.equal(seen[:, 2:], mask) and seen[:, :2].all()
    parts, output = matcher.look(x, t, y, seen)
    assert len(parts) == 5 - 2 * blocks and output.shape == x.shape
    for logits, q, k in parts:
        assert logits.shape == (3, 2, 16, 5) and torch.equal(logits.isinf(), ~mask[:, None, None].expand_as(logits))
        expected = (q @ k.transpose(-2, -1)) * 16**-0.5
        assert torch.allclose(logits[~logits.isinf()], expected[~logits.isinf()], atol=1e-5)


def test_a_score_depends_neither_on_its_batch_nor_on_padding(painter, world):
    matcher, candidates = matcher_of(painter), Candidates(read(world), painter)
    noises = bank(painter, (50, 500), 2)
    together, _ = scores("attention", matcher, candidates, noises)
    for i in (0, 5, 11):
        alone, _ = scores("attention", matcher, Candidates(read(world)[i:i + 1], painter), noises)
        assert torch.allclose(together[candidates.members[i]], alone, atol=1e-5)
    features, mask = painter.encoder(candidates.texts[:2])
    x_t, t = candidates.x_0[:2], torch.tensor([100, 700])
    score, _ = matcher(x_t, t, *matcher.read(features, mask))
    other, _ = matcher(x_t, t, *matcher.read(torch.where(mask[..., None], features, 7.0), mask))
    assert torch.allclose(score, other, atol=1e-5)


def test_swapped_candidates_have_swapped_scores(painter, world):
    matcher, noises, groups = matcher_of(painter), bank(painter, (50, 500), 2), read(world)[:4]
    turned = [group | {"texts": group["texts"][::-1], "right": 1 - group["right"]} for group in groups]
    for how in ("attention", "denoising", "hybrid", "itm"):
        a, b = (Candidates(some, painter) for some in (groups, turned))
        tables = zip(a.split(scores(how, matcher, a, noises)[0]), b.split(scores(how, matcher, b, noises)[0]))
        assert all(np.allclose(one, other[:, ::-1], atol=1e-5) for one, other in tables), how


def test_a_tie_counts_as_wrong_and_a_constant_score_gets_nothing():
    groups = [{"pictures": ["a"], "texts": ["x", "y"], "right": right} for right in (0, 1)]
    for value in (1.0, 0.0, math.nan, math.inf, -math.inf):
        assert grade.verdicts(groups, [np.full((1, 2), value)] * 2)["", "R@1"].mean() == 0
        assert not any(array.any() for array in grade.verdicts([{}], [np.full((2, 2), value)]).values())
        figures = grade.recalls(np.full((12, 24), value), [i // 2 for i in range(24)])
        assert set(figures.values()) == {0.0}
    assert [grade.rank(np.array([3.0, 1.0, 2.0, 2.0]), i) for i in range(4)] == [1, 4, 3, 3]
    assert grade.rank(np.array([1.0, math.nan]), 0) == 2 and grade.rank(np.array([math.nan, 1.0]), 0) == 2


def test_all_candidates_are_compared_at_the_same_noise(painter, world, monkeypatch):
    matcher, candidates, seen = matcher_of(painter), Candidates(read(world), painter), []
    denoise = matcher.network.denoise

    def watching(x_t, t, *more):
        seen.append((x_t, t))
        return denoise(x_t, t, *more)
    monkeypatch.setattr(matcher.network, "denoise", watching)
    scores("attention", matcher, candidates, bank(painter, (50, 500), 3))
    assert len(seen) == 3
    noises = []
    for x_t, t in seen:
        a, s = painter.diffusion.scales(t, x_t)
        eps = (x_t - a * candidates.x_0[candidates.pairs[:, 0]]) / s
        assert len(t.unique()) == 1 and (eps - eps[0]).abs().max() < 1e-3
        noises.append(eps[0])
    assert (noises[0] - noises[1]).abs().max() > 1
    assert [(t, eps.sum()) for t, eps in bank(painter, (50, 500), 3)] == [(t, eps.sum()) for t, eps in bank(painter, (50, 500), 3)]
    assert sorted(int(t) for t, _ in bank(painter, (50, 500), 4)) == [50, 200, 350, 500]


def test_in_training_the_candidates_of_a_group_share_t_and_noise(painter, world, tmp_path, monkeypatch):
    s, seen = Settings(batch=3, steps=2, negatives=2, prompts=0, warmup=0), []
    matcher, candidates = Matcher(s, painter), Candidates(read(world), painter)
    forward = Matcher.forward

    def watching(self, x_t, t, *more):
        seen.append((x_t, t))
        return forward(self, x_t, t, *more)
    monkeypatch.setattr(Matcher, "forward", watching)
    dsd.train(s, matcher, candidates, tmp_path / "run", common.Options())
    for x_t, t in seen:
        x_t, t = x_t.view(3, 3, *x_t.shape[1:]), t.view(3, 3)
        assert (t == t[:, :1]).all() and (x_t == x_t[:, :1]).all() and len(t[:, 0].unique()) > 1             # one picture, several texts


@pytest.mark.parametrize("change", [dict(blocks="0"), dict(heads="1"), dict(blocks="0,2", heads="0"), dict(pool="mean"), dict(pool="max"),
                                    dict(pool="cosine")])
def test_blocks_heads_and_poolings_are_chosen_by_flag(painter, world, change):
    candidates, noises = Candidates(read(world)[:2], painter), bank(painter, (50, 500), 1)
    plain, other = (scores("attention", Matcher(untuned(Settings(**some)), painter), candidates, noises)[0] for some in ({}, change))
    assert other.isfinite().all() and not torch.allclose(plain, other, atol=1e-4)


def test_blocks_are_averaged(painter, world):
    candidates, noises = Candidates(read(world)[:2], painter), bank(painter, (50, 500), 1)
    each = [scores("attention", Matcher(untuned(Settings(blocks=str(i))), painter), candidates, noises)[0] for i in range(3)]
    whole = scores("attention", Matcher(untuned(Settings()), painter), candidates, noises)[0]
    assert torch.allclose(torch.stack(each).mean(0), whole, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- what is tuned
def test_lora_at_its_start_changes_nothing_and_merged_equals_unmerged():
    for fusion in ("concat", "cross"):                                        # cross-attention reads the weight itself
        plain, given = randomized(network(fusion=fusion)), inputs(SMALL)
        before, names = plain(*given), set(plain.state_dict())
        tuned = add_lora(plain, 2)
        assert torch.equal(tuned(*given), before)
        trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
        assert trained and all(name.endswith((".A", ".B")) and ("qkv" in name or "proj" in name) for name in trained)
        for name, parameter in tuned.named_parameters():
            if name in trained:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        after = tuned(*given)
        assert not torch.allclose(after, before, atol=1e-2)
        merged = merge_lora(tuned)
        assert torch.allclose(merged(*given), after, atol=1e-5) and set(merged.state_dict()) == names


def test_the_change_of_lora_has_its_rank():
    layer = torch.nn.ModuleDict({"qkv": torch.nn.Linear(12, 20)})
    before = layer["qkv"].weight.detach().clone()
    add_lora(layer, 3)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(layer["qkv"].weight - before) == 3
    with pytest.raises(common.UserError, match="LoRA: Linear has no linear layer named"):
        add_lora(torch.nn.Linear(2, 2), 1)


def test_the_base_gets_no_gradient_and_stays_as_it_is(painter, world):
    before = {name: tensor.clone() for name, tensor in painter.model.state_dict().items()}
    matcher, candidates = matcher_of(painter), Candidates(read(world)[:2], painter)
    y, mask = matcher.read(*painter.encoder(candidates.texts))
    score, _ = matcher(candidates.x_0[candidates.pairs[:, 0]], torch.full((4,), 300), y, mask)
    hinge(score[:2], score[2:, None], 1000.0).backward()
    assert {name for name, parameter in matcher.named_parameters() if parameter.grad is not None} <= set(matcher.tuned())
    kinds = {"prompts", "weight", "A", "B"}
    assert {name.split(".")[-1] for name, parameter in matcher.tuned().items() if parameter.grad is not None and parameter.grad.any()} == kinds
    assert all(parameter.grad is None for parameter in painter.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in painter.model.state_dict().items())


def test_untuned_is_zero_shot(painter, world):
    candidates, noises = Candidates(read(world)[:3], painter), bank(painter, (50, 500), 2)
    new, plain = Matcher(Settings(prompts=0), painter), Matcher(untuned(Settings()), painter)
    assert new.tuned() and not plain.tuned()
    assert torch.allclose(scores("attention", new, candidates, noises)[0], scores("attention", plain, candidates, noises)[0], atol=1e-6)


def test_the_hinge_looks_at_the_hardest_negative():
    right, wrong = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([[0.0, 0.9], [0.5, 0.7], [2.0, 0.0]])
    assert hinge(right, wrong, 0.2).item() == pytest.approx((0.1 + 0.0 + 1.2) / 3, abs=1e-6)


def test_negatives_are_a_groups_own_and_texts_alike_of_other_groups(painter, world):
    assert alike(["a red circle", "a red square", "two dogs", "a RED circle!"])[0][:2] == [3, 1]
    candidates = Candidates(read(world), painter)
    for group, (right, own, others) in zip(candidates.groups, examples(candidates)):
        told = [candidates.texts[text] for _, text in (right, *own)]
        assert told == [group["texts"][group["right"]], group["texts"][1 - group["right"]]]
        assert len(others) == 22 and all(picture == right[0] and candidates.texts[text] not in told for picture, text in others)


# -------------------------------------------------------------------------------------------------------------- the rivals
def test_errors_are_those_of_eps_whatever_the_network_predicts(painter, world, monkeypatch):
    """A network that knows x_0 makes no error, by whichever target."""
    matcher, (t, eps) = Matcher(untuned(Settings()), painter), bank(painter, (300, 600), 1)[0]
    candidates = Candidates(read(world)[:1], painter)
    x_0, (y, mask) = candidates.x_0, matcher.read(*painter.encoder(["a man"]))
    diffusion = painter.diffusion
    a, s = diffusion.scales(t[None], x_0)
    for target, output in {"eps": eps[None], "v": a * eps - s * x_0, "x0": x_0}.items():
        monkeypatch.setattr(diffusion, "target", target)
        for wrong in (0, 0.1):
            def denoise(x_t, t, y, mask, record, says=output + wrong):
                keys = 16 + 1 + y.shape[1]
                record += [(torch.zeros(1, 2, keys, keys),) * 3] * 5
                return says
            monkeypatch.setattr(matcher.network, "denoise", denoise)
            error = evaluate(matcher, x_0, y, mask, t, eps)[1].abs().max()
            assert error > 1e-3 if wrong else error < 1e-4, target


def test_the_hybrid_and_itm_add_what_the_empty_text_tells(painter, world):
    matcher, candidates, noises = matcher_of(painter, prompts=0, lora_rank=0), Candidates(read(world)[:3], painter), bank(painter, (300, 600), 2)
    empty = Candidates([group | {"texts": ["", ""], "right": 0} for group in read(world)[:3]], painter)
    got = {how: scores(how, matcher, candidates, noises) for how in ("attention", "denoising", "itm", "hybrid")}
    assert {how: evaluations for how, (_, evaluations) in got.items()} == {"attention": 4, "denoising": 4, "itm": 6, "hybrid": 6}
    without = scores("denoising", matcher, empty, noises)[0]
    assert torch.allclose(got["itm"][0], got["denoising"][0] - without, atol=1e-4)
    added, (t, eps) = got["hybrid"][0] - got["attention"][0], noises[0]
    assert added.abs().max() > 1e-6
    one = scores("hybrid", matcher, candidates, noises[:1])[0] - scores("attention", matcher, candidates, noises[:1])[0]
    (place, told), told_nothing = candidates.pairs.T, matcher.read(*painter.encoder([""] * 6))
    residual = evaluate(matcher, candidates.x_0[place], *matcher.read(*painter.encoder([candidates.texts[i] for i in told])), t, eps)[1]
    plain = evaluate(matcher, candidates.x_0[place], *told_nothing, t, eps)[1]
    assert torch.allclose(one, plain.abs().mean((1, 2, 3)) - residual.abs().mean((1, 2, 3)), atol=1e-5)


def test_pruning_drops_what_is_surely_behind_and_spends_less(painter, world, monkeypatch):
    candidates, noises = Candidates(read(world)[:6], painter), bank(painter, (50, 500), 12)
    matcher, calls = Matcher(untuned(Settings()), painter), []

    every = matcher.read(*painter.encoder(candidates.texts))[0]             # two texts a group, all different

    def errors(matcher, x_0, y, mask, t, eps, batch=256):
        """Candidates of even groups differ by far, those of odd ones by chance only."""
        calls.append(len(x_0))
        numbers = (y[:, None] - every).abs().sum((2, 3)).argmin(1)
        size = torch.where((numbers // 2 % 2 == 0) & (numbers % 2 == 1), 3.0, 1.0)
        noise = 0.1 * torch.randn(12, generator=torch.Generator().manual_seed(len(calls)))[numbers]
        return torch.zeros(len(x_0)), (size + noise)[:, None, None, None].expand(-1, 3, 2, 2)
    monkeypatch.setattr(dsd, "evaluate", errors)
    values, evaluations = scores("denoising", matcher, candidates, noises, prune=True)
    tables = candidates.split(values)
    assert calls[:4] == [12] * 4 and all(count < 12 for count in calls[4:]) and evaluations == sum(calls) / 6 < 24
    assert all(table[0, 0] > table[0, 1] == -math.inf for table in tables[0::2])
    calls.clear()
    assert scores("denoising", matcher, candidates, noises)[1] == 24 and calls == [12] * 12


# -------------------------------------------------------------------------------------------------------------- the tasks
def test_winoground_asks_for_both_texts_and_both_pictures():
    tables = {"all": [[2, 1], [1, 2]], "text": [[2, 1], [5, 6]], "image": [[2, 5], [1, 6]], "none": [[1, 2], [2, 1]]}
    expected = {"all": (1, 1, 1), "text": (1, 0, 0), "image": (0, 1, 0), "none": (0, 0, 0)}
    for name, table in tables.items():
        found = grade.verdicts([{"kind": ""}], [np.array(table, float)])
        assert tuple(found["", measure].item() for measure in ("text", "image", "group")) == expected[name], name


def test_of_ten_texts_the_first_five_count_too():
    groups = [{"pictures": ["a"], "texts": list("abcdefghij"), "right": 2, "kind": "ten"}] * 2
    found = grade.verdicts(groups, [np.arange(10.0)[None], -np.arange(10.0)[None]])
    assert found["ten", "R@1"].tolist() == [0, 0] and found["ten", "R@5"].tolist() == [0, 1]


def test_recall_finds_any_text_of_a_picture_and_the_picture_of_a_text():
    owner, table = [0, 0, 1, 1], np.array([[0.1, 0.9, 0.5, 0.2], [0.3, 0.2, 0.4, 0.8]])
    figures = grade.recalls(table, owner)
    assert figures["text_R@1"] == 100 and figures["picture_R@1"] == 50 and figures["picture_R@5"] == 100


def test_groups_are_read_with_pictures_beside_the_file(world):
    groups = read(world)
    assert len(groups) == 12 and groups[3]["pictures"] == [str(world / "coco/train2017/000000000003.jpg")] and groups[3]["right"] == 1


@pytest.mark.parametrize("line", ["{", "7", '{"pictures": ["a"]}', '{"pictures": ["a"], "texts": ["x"], "right": 0}',
                                  '{"pictures": "a", "texts": ["x", "y"], "right": 0}', '{"pictures": ["a"], "texts": ["x", "y"], "right": 2}',
                                  '{"pictures": ["a"], "texts": ["x", "y"]}', '{"pictures": ["a", "b"], "texts": ["x", "y"], "right": 0}',
                                  '{"pictures": ["a"], "texts": ["x", 3], "right": 0}',
                                  '{"pictures": ["a"], "texts": ["x", "y"], "right": "0"}', '{"pictures": ["a"], "texts": ["x", "y"], "right": -1}'])
def test_a_line_that_is_no_group_is_named(world, tmp_path, line):
    good = (world / "pairs.jsonl").read_text().splitlines()[0]
    (tmp_path / "groups.jsonl").write_text(f"{good}\n{line}\n")
    refused(run("dsd.py", "--groups", tmp_path / "groups.jsonl", "--run", "run", *FLAGS, cwd=world), "groups.jsonl, line 2", "expected")


COMVG = "id,sentence,pos_triplet,neg_triplet,pos_image_id,neg_image_id,neg_value\n"


def test_comvg_is_read_with_the_right_picture_anywhere(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.jpg")
    others = ("dog,ride,horse", "man,feed,horse", "man,ride,dog")
    rows = [f'{i},a man rides a horse,"man,ride,horse","{others[i % 3]}",{i},{i + 10},x\n' for i in range(10)]
    (tmp_path / "comvg.csv").write_text(COMVG + "".join(rows))
    groups = grade.read_comvg(tmp_path / "comvg.csv", tmp_path)
    assert [group["kind"] for group in groups[:3]] == ["subject", "verb", "object"] and {group["right"] for group in groups} == {0, 1}
    assert all(group["pictures"][group["right"]].endswith(f"/{i}.jpg") for i, group in enumerate(groups))


def test_the_toy_worlds_groups_have_one_field_changed_and_the_right_one_anywhere(tmp_path):
    shapes.build(tmp_path / "shapes", 16, train=60, val=80)
    build_matching(tmp_path / "shapes", 16, train=24, test=5, others=8)
    notes = tmp_path / "shapes" / "annotations"
    for name, count in {"train": 24, "val": 20, "pictures": 8, "ten": 8, "winoground": 8}.items():
        groups = grade.read_groups(notes / f"match_{name}.jsonl")
        assert len(groups) == count
        for group in groups:
            dsd.load_pictures(group["pictures"], 16)
        if name in ("train", "val"):
            assert {group["right"] for group in groups} == {0, 1} and len({group["pictures"][0] for group in groups}) == count
            assert [group["kind"] for group in groups[:4]] == list(shapes.FIELDS[:4])
            assert all(("train2017" if name == "train" else "val2017") in group["pictures"][0] for group in groups)
            relations = {word for synonyms in shapes.PREPOSITIONS.values() for phrase in synonyms for word in phrase.split()}
            relations |= set("a picture of an image is are".split())          # another word order has other words in its frame
            assert all(set(a.split()) ^ set(b.split()) <= relations for a, b in (group["texts"] for group in groups if group["kind"] == "relation"))
        elif name == "winoground":
            assert all(sorted(a.split()) == sorted(b.split()) and a != b for a, b in (group["texts"] for group in groups))
            for group in groups:                                              # the exact judge agrees: each picture shows its own text's scene only
                told = [shapes.parse(dsd.load_pictures([path], 16).permute(0, 2, 3, 1).numpy())[0] for path in group["pictures"]]
                assert sorted((thing.colour, thing.shape) for thing in told[0]) == sorted((thing.colour, thing.shape) for thing in told[1])
    before = (notes / "match_ten.jsonl").stat().st_mtime_ns
    build_matching(tmp_path / "shapes", 16)
    assert (notes / "match_ten.jsonl").stat().st_mtime_ns == before


# ----------------------------------------------------------------------------------------------------------------- a run
def test_a_run_holds_only_what_was_tuned_and_says_what_it_stands_on(world, painter):
    tensors, config = load_file(world / "run" / "model.safetensors"), json.loads((world / "run" / "config.json").read_text())
    assert set(tensors) == set(Matcher(Settings(prompts=2, lora_rank=2), painter).tuned())
    assert sum(tensor.numel() for tensor in tensors.values()) < 0.2 * sum(p.numel() for p in painter.model.parameters())
    assert config["base"] == "base" and len(config["base_identity"]) == 64
    assert (world / "run" / "metrics.csv").read_text().splitlines()[0] == "step,loss,right,lr" and (world / "run" / "loss.png").stat().st_size > 0


def test_a_resumed_tuning_equals_an_uninterrupted_one(world, painter, tmp_path, monkeypatch):
    s, steps = common.read_settings(Settings, world / "run"), []
    matcher, candidates, plain = Matcher(s, painter), Candidates(read(world), painter), dsd.hinge

    def stopping(*values):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return plain(*values)
    monkeypatch.setattr(dsd, "hinge", stopping)
    with pytest.raises(KeyboardInterrupt):
        dsd.train(s, matcher, candidates, tmp_path / "cut", common.Options(save_every=1))
    monkeypatch.undo()
    status, _, errors = run("dsd.py", *TUNE, "--resume", "--out", tmp_path / "cut", cwd=world)
    assert status == 0, errors
    assert (world / "run" / "model.safetensors").read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()


def test_a_tuning_is_not_resumed_in_another_precision(world):
    before = (world / "run" / "state.pt").read_bytes()
    refused(run("dsd.py", *TUNE, "--precision", "bf16", "--resume", "--out", "run", cwd=world), "run/ was trained in torch.float32", "--precision")
    assert (world / "run" / "state.pt").read_bytes() == before


def test_texts_are_ranked_for_a_picture_and_drawn(world, tmp_path):
    picture = "coco/val2017/000000000001.jpg"
    texts = "a man on a horse", "two red circles", "x"
    status, out, errors = run("dsd.py", picture, *texts, "--run", "run", "--out", tmp_path / "map.png", *FLAGS, cwd=world)
    assert status == 0, errors
    said = [float(line.split()[-1]) for line in out.splitlines() if line.startswith(("a man", "two red", "x "))]
    assert len(said) == 3 and said == sorted(said, reverse=True)
    assert Image.open(tmp_path / "map.png").width > 5 * 144


def test_words_have_the_tokens_that_spell_them(clip_folder):
    encoder = common.TextEncoder(clip_folder)
    text = "two zebras above a blue square"
    ids = encoder.tokenizer(text).input_ids
    for word, tokens in words(encoder.tokenizer, text, 16):
        assert encoder.tokenizer.decode([ids[i] for i in tokens]).strip() == word
    assert [word for word, _ in words(encoder.tokenizer, text, 4)] != text.split()


def test_maps_are_shares_of_the_attention_of_each_patch(painter, world):
    candidates = Candidates(read(world)[:1], painter)
    maps = dsd.attention_maps(matcher_of(painter), candidates.x_0, "a man on a horse", bank(painter, (50, 500), 2))
    assert maps.shape == (4, 4, 16) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    assert (maps[..., painter.encoder(["a man on a horse"])[1][0].sum():] == 0).all()


@pytest.mark.parametrize("flags, said", [(["--groups", "pairs.jsonl"], "12 groups, 4 network evaluations"),
                                         (["--groups", "winoground.jsonl", "--zero-shot"], "group"),
                                         (["--retrieval", "coco", "--pool-size", 2], "2 pictures, 10 captions")])
def test_every_task_runs(world, flags, said):
    status, out, errors = run("dsd.py", *flags, "--run", "run", *FLAGS, cwd=world)
    assert status == 0 and said in out, errors


def test_the_toy_world_is_tuned_on_and_graded_from_end_to_end(world, clip_folder, tmp_path):
    rng = random.Random(0)
    shapes.build(tmp_path / "data" / "shapes", 24, train=60, val=80)
    build_matching(tmp_path / "data" / "shapes", 24, train=8 + rng.randint(0, 1), test=2, others=2)
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "data/shapes", "--clip", clip_folder, "--steps", 2, "--out", "base", *TINY,
                            "--size", 24, cwd=tmp_path)
    assert status == 0, errors
    status, out, errors = run("dsd.py", "--train", "--base", "base", "--shots", 8, "--batch", 2, "--steps", 2, "--evaluations", 1, "--samples", 2,
                              "--others", 2, *FLAGS, cwd=tmp_path)
    assert status == 0, errors
    figures = json.loads((tmp_path / "runs" / "dsd" / "results.json").read_text())
    expected = {"accuracy", "count", "colour", "shape", "relation", "zero_shot", "clip_zero_shot", "clip_few_shot", "over_clip_few_shot",
                "relation_over_clip", "relation_zero_shot", "clip_relation", "clip_count", "clip_colour", "clip_shape", "denoising", "evaluations",
                "denoising_evaluations", "seconds"}
    assert expected <= set(figures) and figures["evaluations"] == 2
    assert (tmp_path / "runs" / "dsd" / "samples" / "attention.png").stat().st_size > 0


def test_another_base_is_refused(world, tmp_path):
    for name in ("base", "run"):
        shutil.copytree(world / name, tmp_path / name)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    common.save_tensors(tensors | {"norm.bias": tensors["norm.bias"] + 1}, tmp_path / "base" / "model.safetensors")
    refused(run("dsd.py", "--groups", world / "pairs.jsonl", *FLAGS, "--run", "run", cwd=tmp_path), "was tuned for base as it was then", "--train")
    (tmp_path / "pairs.jsonl").write_text((world / "pairs.jsonl").read_text())
    shutil.copytree(world / "coco", tmp_path / "coco")
    refused(run("dsd.py", *TUNE, "--resume", "--out", "run", cwd=tmp_path), "run/ was begun from base as it was then", "--overwrite")


@pytest.mark.parametrize("flags, said", [
    (["nowhere.png", "a", "--run", "run"], ["nowhere.png cannot be read"]), (["coco/val2017/000000000001.jpg", "--run", "run"], ["texts to rank"]),
    (["--groups", "nowhere.jsonl", "--run", "run"], ["nowhere.jsonl"]),
    (["--groups", "pairs.jsonl", "--run", "nowhere"], ["no run in nowhere/", "--train"]),
    (["--comvg", "pairs.jsonl", "--run", "run"], ["--comvg pairs.jsonl"]), (["--comvg", "nowhere.csv", "--run", "run"], ["--comvg nowhere.csv"]),
    ([*TUNE, "--out", "new", "--comvg", "comvg.csv"], ["--train and --comvg do not go together"]),
    ([*TUNE, "--out", "new", "--retrieval", "coco", "--groups", "pairs.jsonl"], ["--train and --retrieval do not go together"]),
    (["coco/val2017/000000000001.jpg", "a man", *TUNE, "--out", "new"], ["--train and a picture do not go together"]),
    (["--groups", "pairs.jsonl", "--retrieval", "coco", "--run", "run"], ["--retrieval and --groups do not go together"]),
    ([*TUNE, "--out", "run"], ["run/ holds a run already"]), ([*TUNE, "--out", "new", "--blocks", "7"], ["--blocks 7", "0 to 2"]),
    ([*TUNE, "--out", "new", "--heads", "x"], ["--heads x"]), ([*TUNE, "--out", "new", "--times", 500, 50], ["--times 500 50"]),
    ([*TUNE, "--out", "new", "--pool", "sum"], ["--pool sum", "lse"]),
    ([*TUNE, "--out", "new", "--prompts", 0, "--lora-rank", 0, "--no-head-weights"], ["nothing is to be tuned"]),
    ([*TUNE, "--out", "new", "--data", "winoground.jsonl"], ["winoground.jsonl", "no group with a right candidate"]),
    ([*TUNE, "--out", "new", "--base", "nowhere"], ["nowhere"])])
def test_slips_end_in_one_line(world, flags, said):
    refused(run("dsd.py", *flags, *FLAGS, cwd=world), *said)
    assert not (world / "new").exists()


def test_without_a_flag_comes_the_help(world):
    status, out, _ = run("dsd.py", cwd=world)
    assert status == 0 and "--train" in out and "--zero-shot" in out
