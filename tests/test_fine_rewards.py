"""Semantic rewards and learning from the best: what each reward is, how rewards become one choice, what a round trains, and rounds cut off."""
import copy
import csv
import dataclasses
import functools
import json
import math
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_coco, run
from PIL import Image
from safetensors.torch import load_file
from test_llm_adapter import DECODER
from test_training import TINY, refused

import common
import eval as grade
import fine_rewards
import sample
import toy
import uvit_fusion
from autoencoder import Autoencoder
from common import UserError
from fine_rewards import (
    PRESETS,
    REWARDS,
    Captioner,
    LabelScorer,
    Masks,
    Rewards,
    Segmenter,
    as_data,
    assemble,
    choose,
    connected_parts,
    diversity,
    draw_and_score,
    ranks,
    round_prompts,
    sam_reward,
)
from toy import experts, shapes

# what the claims below are about: all prompts are kept, and the three rewards weigh the same
Settings = functools.partial(fine_rewards.Settings, keep=1.0, weights=(1.0, 1.0, 1.0, 0.0))

CPU = torch.device("cpu")
PROMPTS = ["two red circles above a blue square", "a man on a horse", "a blue square", "red, circle, x2"]
LABELS = ["red circle", "blue square", "a horse"]
RNG = np.random.default_rng(0)


# ----------------------------------------------------------------------------------------------- small experts of random weights
def save(folder, model, *others, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():                                      # at their first weights most say the same of every picture
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    for part in (model, *others):
        part.save_pretrained(folder)
    return str(folder)


def new_captioner(folder):
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor
    tokenizer = experts.train_tokenizer(PROMPTS, 300)
    size = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    words = dict(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, sep_token_id=3)
    model = BlipForConditionalGeneration(BlipConfig(vision_config=size | dict(image_size=24, patch_size=8), text_config=size | words))
    return save(folder, model, BlipProcessor(BlipImageProcessorPil(size={"height": 24, "width": 24}), tokenizer))


def new_segmenter(folder, names=("background", *LABELS)):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil
    model = SegformerForSemanticSegmentation(SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[1, 2], sr_ratios=[4, 2], num_attention_heads=[1, 1],
        mlp_ratios=[2, 2], decoder_hidden_size=8, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}))
    return save(folder, model, SegformerImageProcessorPil(size={"height": 24, "width": 24}))


def new_sam(folder):
    from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor
    sizes = dict(image_size=32, patch_size=8)
    model = SamModel(SamConfig(
        vision_config=sizes | dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, output_channels=16, global_attn_indexes=[0],
                                   mlp_dim=16, num_pos_feats=8, window_size=0),
        prompt_encoder_config=sizes | dict(hidden_size=16, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)))
    model.mask_decoder.iou_prediction_head.proj_out.bias.data += 1            # sure of some of its masks
    return save(folder, model, SamProcessor(SamImageProcessorPil(
        size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}, mask_size={"longest_edge": 8}, mask_pad_size={"height": 8, "width": 8})))


def new_llm(folder, texts=PROMPTS):
    from transformers import LlamaConfig, LlamaForCausalLM
    return save(folder, LlamaForCausalLM(LlamaConfig(**DECODER)), experts.train_tokenizer(texts, 300, 64, "<|start|> $A"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder):
    """A folder with a small toy world, a base of random weights, and experts that have learnt nothing."""
    folder = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    shapes.build(folder / "data" / "shapes", 24, train=40, val=16)
    shapes.build_quality(folder / "data" / "shapes", 24, count=4)
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "data/shapes", "--clip", clip_folder, "--steps", 1, "--out", "base", *TINY,
                            "--size", 24, "--guidance", 1, cwd=folder)
    assert status == 0, errors
    generator = torch.Generator().manual_seed(0)
    common.save_tensors({name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
                         for name, tensor in load_file(folder / "base" / "model.safetensors").items()}, folder / "base" / "model.safetensors")
    for name, new in (("captioner", new_captioner), ("segmenter", new_segmenter), ("sam", new_sam), ("llm", new_llm)):
        new(folder / name)
    common.save_tensors({"weight": torch.randn(1, 32), "bias": torch.randn(1)}, folder / "scorer.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def two_prompts_at_a_time():
    """So that few prompts are several batches too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw_and_score, "__defaults__", (2,))
        yield


@pytest.fixture(scope="module")
def painter(world):
    return sample.load_run(world / "base", "cpu", "fp32")


@pytest.fixture(scope="module")
def dataset(painter, world):
    return painter.data(world / "data" / "shapes", "train")


def settings(world, **change):
    paths = {name: str(world / name) for name in ("base", "captioner", "segmenter", "llm")} | {"scorer": str(world / "scorer.safetensors")}
    small = dict(candidates=3, prompts=5, rounds=2, sample_steps=2, steps=3, batch=4, rank=2, warmup=0, lr=1e-2, instruction="{prompt} {label}")
    return Settings(**paths | small | dict(data=str(world / "data" / "shapes")) | change)


def rewards_of(world, painter, **change):
    return Rewards(settings(world, **change), painter.settings.clip, CPU, torch.float32)


def some_pictures(n, side=24):
    """Of large patches, so that a segmenter of random weights finds parts in them."""
    coarse = RNG.integers(0, 255, (n, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST)) for x in coarse])


def random_rewards(prompts, candidates, names=REWARDS[:3]):
    """With many equals among them."""
    return {name: RNG.integers(0, 5, (prompts, candidates)) * scale for name, scale in zip(names, (0.01, 1.0, 30.0))}


# ------------------------------------------------------------------------------------------------------------- ranks and choice
def plain_ranks(values):
    """From the places in the sorted list, as one would by hand."""
    order = sorted(values, reverse=True)
    return [sum(place for place, other in enumerate(order) if other == value) / order.count(value) for value in values]


def test_ranks_are_places_in_the_sorted_list():
    for _ in range(50):
        rewards = RNG.integers(0, 6, (4, 7)) / 10
        assert np.allclose(ranks(rewards), [plain_ranks(row.tolist()) for row in rewards])


def test_equal_rewards_share_their_mean_rank():
    assert ranks(np.array([0.5, 0.9, 0.5, 0.1, 0.5])).tolist() == [2, 0, 2, 4, 2]
    assert ranks(np.zeros(4)).tolist() == [1.5] * 4


def test_a_permutation_of_candidates_permutes_their_ranks():
    rewards, order = random_rewards(6, 10), RNG.permutation(10)
    for values in rewards.values():
        assert np.array_equal(ranks(values[:, order]), ranks(values)[:, order])
    for how in ("ranks", "sum"):
        s = Settings(choose=how)
        assert np.allclose(assemble(s, {name: values[:, order] for name, values in rewards.items()}), assemble(s, rewards)[:, order])


@pytest.mark.parametrize("how", ["ranks", "sum"])
def test_the_best_candidate_under_every_reward_is_chosen(how):
    rewards, best = random_rewards(20, 10), RNG.integers(10, size=20)
    for values in rewards.values():
        values[np.arange(20), best] = 10 * values.max()
    among, chosen = choose(Settings(choose=how), rewards, 20, 0)
    assert among.tolist() == list(range(20)) and np.array_equal(chosen, best)


@pytest.mark.parametrize("name", REWARDS)
def test_alone_a_reward_chooses_its_highest_and_of_equals_the_first(name):
    weights = tuple(float(name == other) for other in REWARDS)
    rewards = {name: np.array([[0.1, 0.4, 0.4, 0.3], [0.2, 0.2, 0.2, 0.2]])}
    for how in ("ranks", "sum"):
        assert choose(Settings(choose=how, weights=weights), rewards, 2, 0)[1].tolist() == [1, 0]


def test_the_choice_is_that_of_the_smallest_weighted_sum_of_ranks():
    s, rewards = Settings(weights=(1.0, 0.5, 2.0, 0.0)), random_rewards(30, 6)
    sums = [[sum(weight * plain_ranks(rewards[name][p].tolist())[k] for name, weight in zip(REWARDS[:3], s.weights)) for k in range(6)]
            for p in range(30)]
    assert choose(s, rewards, 30, 0)[1].tolist() == [row.index(min(row)) for row in sums]


def test_ranks_do_not_see_the_unit_of_a_reward_and_a_sum_does_not_see_its_scale():
    rewards = random_rewards(20, 10)
    bent = rewards | {"clip": np.exp(rewards["clip"] / 10)}
    assert np.array_equal(assemble(Settings(), bent), assemble(Settings(), rewards))
    scaled = rewards | {"clip": 1000 * rewards["clip"] - 5}
    assert np.allclose(assemble(Settings(choose="sum"), scaled), assemble(Settings(choose="sum"), rewards))
    assert not np.allclose(assemble(Settings(choose="sum"), bent), assemble(Settings(choose="sum"), rewards))


@pytest.mark.parametrize("how", ["ranks", "sum"])
def test_a_reward_that_is_the_same_for_all_decides_nothing(how):
    clip = RNG.random((20, 10)).astype(np.float32)
    mute = {"caption": np.full((20, 10), 0.3, np.float32), "sam": np.full((20, 10), -0.5, np.float32), "clip": clip}
    assert np.array_equal(choose(Settings(choose=how), mute, 20, 0)[1], clip.argmax(1))


@pytest.mark.parametrize("how", ["ranks", "sum"])
def test_kept_are_the_prompts_whose_chosen_pictures_rank_best_among_all(how):
    s, rewards = Settings(choose=how, keep=0.3), random_rewards(20, 10)
    _, best = choose(dataclasses.replace(s, keep=1.0), rewards, 20, 0)
    chosen = {name: values[np.arange(20), best] for name, values in rewards.items()}
    if how == "ranks":
        order = np.sum([plain_ranks(values.tolist()) for values in chosen.values()], 0)
    else:
        order = -np.sum([values / values.std() for values in chosen.values()], 0)
    among, kept = choose(s, rewards, 20, 0)
    assert among.tolist() == sorted(sorted(range(20), key=lambda i: (round(order[i], 6), i))[:6])
    assert np.array_equal(kept, best[among])
    assert len(choose(dataclasses.replace(s, keep=0.01), rewards, 20, 0)[0]) == 1            # at least one


def test_random_depends_on_the_seed_and_the_round_and_not_on_rewards():
    s = Settings(choose="random", keep=0.5)
    first, again, other = (choose(s, rewards, 1000, 0) for rewards in ({}, {}, random_rewards(1000, 10)))
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(first, again, other))
    for more in (choose(s, {}, 1000, 1), choose(dataclasses.replace(s, seed=1), {}, 1000, 0)):
        assert not np.array_equal(first[0], more[0]) and not np.array_equal(first[1], more[1])
    assert len(set(first[0])) == len(first[0]) == 500 and np.bincount(first[1], minlength=10).min() > 25


# --------------------------------------------------------------------------------------------------------------------- parts
def test_connected_parts_are_those_of_the_judge():
    for labels, height, width in ((2, 9, 7), (3, 24, 24), (6, 1, 13), (4, 13, 1)):
        maps = RNG.integers(0, labels, (8, height, width))
        assert np.array_equal(connected_parts(torch.tensor(maps)).numpy(), shapes.components(maps))
    snake = np.zeros((1, 9, 9), int)                                          # a part that turns round many times
    snake[0, ::2], snake[0, 1::4, -1], snake[0, 3::4, 0] = 1, 1, 1
    assert len(connected_parts(torch.tensor(snake)).unique()) == 2


def test_parts_do_not_reach_over_the_edges_of_a_picture():
    maps = torch.zeros(3, 5, 6, dtype=torch.long)
    maps[0, 2, [0, 5]] = 1                                                    # left and right
    maps[1, [0, 4], 3] = 1                                                    # above and below
    maps[2, [0, 4], [0, 5]] = 1                                               # corners
    assert all(len(parts[parts > 0].unique()) == 2 for parts in connected_parts(maps))


@pytest.mark.parametrize("names, side", [(("background", *LABELS), 24), (("background", *LABELS), 32), ((*LABELS, "sky"), 24)])
def test_the_segmenter_gives_the_connected_parts_of_its_label_map(tmp_path, names, side):
    import transformers
    folder, pictures = new_segmenter(tmp_path / "segmenter", names), some_pictures(6, side)
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model.eval()(**processor(images=list(pictures), return_tensors="pt"))
    maps = torch.stack(processor.post_process_semantic_segmentation(outputs, target_sizes=[(side, side)] * 6)).numpy()
    segmenter, shift = Segmenter(folder, CPU, torch.float32, smallest=0.02), int(names[0] != "background")
    for labels, components, found in zip(maps, shapes.components(maps + shift), segmenter(pictures)):
        expected = {(components == n).tobytes(): names[labels[components == n][0]] for n in np.unique(components[components > 0])
                    if (components == n).sum() >= 0.02 * side**2}
        assert {mask.tobytes(): name for name, mask in found} == expected and len(found) == len(expected)
    told = [name for found in segmenter(pictures) for name, _ in found]
    assert len(told) > 6 and len(set(told)) > 1 and "background" not in told


def test_small_parts_are_left_out(world, monkeypatch):
    segmenter = Segmenter(str(world / "segmenter"), CPU, torch.float32, smallest=0.01)
    labels = torch.zeros(1, 20, 20, dtype=torch.long)
    labels[0, 0, :4], labels[0, 5, :3] = 1, 2                                 # 1 % of the picture, and less
    monkeypatch.setattr(segmenter, "label_maps", lambda pictures: labels)
    (name, mask), = segmenter(np.zeros((1, 20, 20, 3), np.uint8))[0]
    assert name == LABELS[0] and mask.sum() == 4 and mask[0, :4].all()


def test_a_mask_of_sam_is_named_by_the_label_of_most_of_its_pixels(world, monkeypatch):
    segmenter = Segmenter(str(world / "segmenter"), CPU, torch.float32, smallest=0.01)
    labels, masks = torch.zeros(1, 20, 20, dtype=torch.long), torch.zeros(4, 20, 20, dtype=torch.bool)
    labels[0, :10, :10], labels[0, :10, 10:] = 1, 3
    masks[0, :10, :13], masks[1, :10, 8:], masks[2, 5:], masks[3, 0, :3] = True, True, True, True      # the third: most is background
    monkeypatch.setattr(segmenter, "label_maps", lambda pictures: labels)
    segmenter.sam = lambda picture: list(masks)
    found = segmenter(np.zeros((1, 20, 20, 3), np.uint8))[0]
    assert [name for name, _ in found] == [LABELS[0], LABELS[2]]
    assert all(np.array_equal(mask, expected.numpy()) for (_, mask), expected in zip(found, masks))


def test_of_masks_that_overlap_the_surest_is_kept_and_unsure_ones_are_not(world):
    sam = Masks(str(world / "sam"), CPU, side=2)
    masks = torch.zeros(12, 8, 8, dtype=torch.bool)
    for i, (columns, rows) in enumerate([(8, 4), (8, 5), (8, 1), (4, 8), (2, 2), (8, 8)]):
        masks[i, :rows, :columns] = True
    scores = torch.tensor([0.90, 0.95, 0.94, 0.93, 0.99, 0.80, *[0.99] * 6])                # the last six are empty
    sam.model = lambda **inputs: SimpleNamespace(pred_masks=masks, iou_scores=scores)

    class Processor:
        image_processor = SimpleNamespace(post_process_masks=lambda pred, *sizes: [pred.view(4, 3, 8, 8)])

        def __call__(self, images, input_points, return_tensors):
            assert np.array(input_points).reshape(-1, 2).tolist() == [[2, 2], [6, 2], [2, 6], [6, 6]]
            return common_inputs(original_sizes=torch.tensor([[8, 8]]), reshaped_input_sizes=torch.tensor([[8, 8]]))

    class common_inputs(dict):
        def to(self, *_):
            return self
    sam.processor = Processor()
    kept = sam(np.zeros((8, 8, 3), np.uint8))
    # 4: the surest. 1: 40 pixels. 2: 8 of the 40, kept. 3: shares 20 of 52 with 1. 0: 32 of the 40 of 1, out. 5: unsure
    assert [mask.sum().item() for mask in kept] == [4, 40, 8, 32] and torch.equal(kept[3], masks[3])


def test_sam_runs_in_its_real_format(world):
    picture = some_pictures(1)[0]
    masks = Masks(str(world / "sam"), CPU, side=4, sure=-math.inf, overlap=1.0)(picture)
    assert len(masks) > 2 and all(mask.shape == (24, 24) and mask.dtype == torch.bool and mask.any() for mask in masks)
    found = Segmenter(str(world / "segmenter"), CPU, torch.float32, str(world / "sam"))(some_pictures(3))
    assert len(found) == 3 and all(name in LABELS and mask.shape == (24, 24) for some in found for name, mask in some)


# ------------------------------------------------------------------------------------------------------- the language model's word
def expected_score(llm, prompt, label):
    """Alone, from the whole softmax: sum_k k P(k) / sum_k P(k)."""
    rows = [llm.tokenizer(f"scene: {prompt}. {label}: {k}").input_ids for k in (1, 2, 3)]
    assert len({tuple(row[:-1]) for row in rows}) == 1
    with torch.no_grad():
        p = llm.model(input_ids=torch.tensor([rows[0][:-1]])).logits[0, -1].double().softmax(-1)[[row[-1] for row in rows]]
    return float((p * torch.tensor([1.0, 2.0, 3.0])).sum() / p.sum())


PAIRS = [(prompt, label) for prompt in PROMPTS for label in LABELS]


@pytest.mark.parametrize("space_apart", [True, False])
def test_the_score_of_a_label_is_expected_under_the_answers_probabilities(tmp_path, space_apart):
    scorer = LabelScorer(new_llm(tmp_path / "llm", PROMPTS if space_apart else [*PROMPTS, *["x: 1", "x: 2", "x: 3"] * 50]), "toy", CPU, torch.float32)
    assert len(scorer.tokenizer("x: 1").input_ids) - len(scorer.tokenizer("x:").input_ids) == 1 + space_apart
    expected = [expected_score(scorer, *pair) for pair in PAIRS]
    assert np.allclose(scorer(PAIRS), expected, atol=1e-4) and np.std(expected) > 1e-2
    assert all(1 <= score <= 3 for score in expected)


def test_a_score_depends_neither_on_its_batch_nor_on_what_was_asked_before(world):
    def new():
        return LabelScorer(str(world / "llm"), "toy", CPU, torch.float32)
    together, alone = new()(PAIRS), np.concatenate([new()([pair]) for pair in PAIRS])
    assert np.allclose(together, alone, atol=1e-4)
    scorer = new()
    scorer([(PROMPTS[0], "anything else")] * 3)
    mixed = [PAIRS[5], PAIRS[0], PAIRS[5], PAIRS[3]]
    assert np.allclose(scorer(mixed, batch=2), alone[[5, 0, 5, 3]], atol=1e-4)
    assert np.allclose(scorer(PAIRS, batch=5), alone, atol=1e-4)


def test_a_pair_is_asked_once(world, monkeypatch):
    scorer, asked = LabelScorer(str(world / "llm"), "toy", CPU, torch.float32), []
    monkeypatch.setattr(scorer, "tokens", lambda *pair, plain=scorer.tokens: asked.append(pair) or plain(*pair))
    scorer(PAIRS * 3)
    scorer(PAIRS)
    assert sorted(asked) == sorted(PAIRS)


def test_an_instruction_and_a_prompt_may_hold_braces(world):
    scorer = LabelScorer(str(world / "llm"), 'as {"json": 1} {prompt} {label}', CPU, torch.float32)
    ids, answers = scorer.tokens("a {man}", "horse")
    assert 'as {"json": 1} a {man} horse' in scorer.tokenizer.decode(ids) and scorer.tokenizer.decode(answers).split() == ["123"]


# -------------------------------------------------------------------------------------------------------------------- rewards
def parts_of(*labels):
    return [(label, np.ones((2, 2), bool)) for label in labels]


def test_the_sam_reward_is_its_formula_and_each_label_meets_its_own_prompt():
    table = {("p", "a"): 3.0, ("p", "b"): 1.5, ("q", "a"): 1.0, ("q", "c"): 2.5}
    rewards = sam_reward([parts_of("a", "b"), parts_of("a"), parts_of(), parts_of("a", "a", "c")], ["p", "q", "p", "q"],
                         lambda pairs: np.array([table[pair] for pair in pairs]))
    assert np.allclose(rewards, [(4.5 - 4) / 4, (1 - 2) / 2, -0.5, (4.5 - 6) / 6])


def test_the_sam_reward_lies_between_a_half_below_and_a_half_above_zero():
    def best(pairs):
        return np.full(len(pairs), 3.0)

    def worst(pairs):
        return np.full(len(pairs), 1.0)
    parts = [parts_of(*LABELS[:n]) for n in (1, 2, 3)]
    assert sam_reward(parts, PROMPTS[:3], best).tolist() == [0.5] * 3 and sam_reward(parts, PROMPTS[:3], worst).tolist() == [-0.5] * 3
    assert sam_reward([[], []], PROMPTS[:2], None).tolist() == [-0.5] * 2      # and nothing is asked


def test_rewards_are_what_they_are_called(world, painter):
    rewards, pictures = rewards_of(world, painter, weights=(1.0,) * 4), some_pictures(4)
    scores, captions, parts = rewards(pictures, PROMPTS)
    clip, scorer = grade.ClipScorer(painter.settings.clip), load_file(world / "scorer.safetensors")
    assert captions == Captioner(str(world / "captioner"), CPU, torch.float32)(pictures)
    assert parts[0] and [[name for name, _ in some] for some in parts] == [[name for name, _ in some] for some in rewards.segmenter(pictures)]
    for i, prompt in enumerate(PROMPTS):
        image, text, read = clip.images(pictures[i:i + 1])[0], clip.texts([prompt])[0], clip.texts([captions[i]])[0]
        each = [rewards.labels([(prompt, label)])[0] for label, _ in parts[i]]
        expected = {"caption": F.cosine_similarity(read, text, dim=0), "clip": F.cosine_similarity(image, text, dim=0),
                    "sam": (sum(each) - 2 * len(each)) / (2 * len(each)) if each else -0.5,
                    "aesthetic": scorer["weight"][0] @ image + scorer["bias"][0]}
        for name, value in expected.items():
            assert math.isclose(scores[name][i], value, abs_tol=1e-4), name


def test_a_caption_does_not_depend_on_the_other_pictures(world):
    captioner, pictures = Captioner(str(world / "captioner"), CPU, torch.float32), some_pictures(4)
    captions = captioner(pictures)
    assert captions == [captioner(pictures[i:i + 1])[0] for i in range(4)] and len(set(captions)) > 1


def test_two_prompts_swapped_swap_their_scores(world, painter):
    rewards, picture = rewards_of(world, painter), some_pictures(1)
    one, other = (rewards(np.concatenate([picture] * 2), list(prompts))[0] for prompts in (PROMPTS[:2], PROMPTS[1::-1]))
    for name in rewards.names:
        assert np.allclose(one[name], other[name][::-1], atol=1e-5) and abs(one[name][0] - one[name][1]) > 1e-4, name


def test_rewards_of_weight_zero_are_neither_loaded_nor_computed(world, painter):
    nowhere = dict.fromkeys(("captioner", "segmenter", "llm", "scorer"), "/nowhere")
    rewards = rewards_of(world, painter, weights=(0.0, 0.0, 1.0, 0.0), **nowhere)
    scores, captions, parts = rewards(some_pictures(2), PROMPTS[:2])
    assert list(scores) == rewards.names == ["clip"] and captions == ["", ""] and parts == [[], []] and rewards.seconds["clip"] > 0


def test_the_paper_preset_has_the_values_of_the_release():
    s = fine_rewards.Settings(**PRESETS["paper"])
    assert (s.candidates, s.rounds, s.rank, s.lr, s.weight_decay, s.clip_grad, s.batch, s.decay, s.warmup) == (10, 2, 4, 9e-6, 0.01, 1.0, 8, 0, 0)
    assert s.weights == (1.0, 1.0, 0.0, 0.0) and s.choose == "ranks" and s.keep == 1.0


# ------------------------------------------------------------------------------------------------------------- drawing and scoring
def test_each_candidate_is_drawn_from_its_own_noise_and_scored_against_its_own_prompt(world, painter, tmp_path, monkeypatch):
    for name in ("judge", "parse"):                                           # which grades and is never a reward
        monkeypatch.setattr(shapes, name, None)
    s, prompts = settings(world), [*PROMPTS, "a green triangle"]
    rewards = rewards_of(world, painter)
    candidates, scores, _ = draw_and_score(s, painter, rewards, prompts, tmp_path / "round1", 0)
    assert candidates.shape == (5, 3, 24, 24, 3) and candidates.dtype == np.uint8 and all(values.shape == (5, 3) for values in scores.values())
    for i, prompt in enumerate(prompts):
        for k in range(3):
            picture = painter.draw([prompt], steps=2, guidance=1.5, seed=s.seed + 1, first=3 * i + k)
            assert np.abs(picture[0].astype(int) - candidates[i, k]).max() <= 1
            alone = rewards(candidates[i, k][None], [prompt])[0]
            assert all(math.isclose(scores[name][i, k], alone[name][0], abs_tol=1e-4) for name in ("caption", "sam", "clip")), (i, k)
    assert all(np.ptp(values) > 1e-3 for values in scores.values())


def test_the_next_round_draws_other_candidates(world, painter, tmp_path):
    s, rewards = settings(world, weights=(0.0,) * 4, choose="random"), SimpleNamespace(names=[])
    first, next_ = (draw_and_score(s, painter, rewards, PROMPTS[:2], tmp_path / str(n), n)[0] for n in (0, 1))
    assert np.mean(first != next_) > 0.5


def test_candidates_of_another_network_or_other_prompts_are_drawn_anew(world, painter, tmp_path, capsys):
    s, rewards = settings(world, weights=(0.0,) * 4, choose="random"), SimpleNamespace(names=[])
    before = np.array(draw_and_score(s, painter, rewards, PROMPTS[:2], tmp_path, 0)[0])
    other = draw_and_score(s, painter, rewards, PROMPTS[1::-1], tmp_path, 0)[0]
    assert not np.array_equal(before, other) and "other prompts" in capsys.readouterr().out


def test_scores_of_other_experts_are_computed_anew(world, painter, tmp_path, capsys):
    s, scores = settings(world, weights=(0.0, 1.0, 0.0, 0.0)), []
    new_segmenter(tmp_path / "segmenter", ("background", "a horse", "blue square", "red circle"))
    for path in (s.segmenter, s.segmenter, tmp_path / "segmenter"):
        rewards = rewards_of(world, painter, weights=s.weights, segmenter=str(path))
        rewards.segmenter.model.decode_head.classifier.bias.data += torch.arange(4.0) * (path != s.segmenter)
        rewards.identities = [common.fingerprint(rewards.segmenter.model)]
        scores.append(draw_and_score(s, painter, rewards, PROMPTS, tmp_path / "round1", 0)[1]["sam"])
        assert ("another experts" in capsys.readouterr().out) == (path != s.segmenter)
    assert np.array_equal(*scores[:2]) and not np.array_equal(*scores[1:])


def test_no_picture_gives_two_prompts_before_all_have_given_one(world, dataset):
    s = settings(world, prompts=16)
    rounds = [round_prompts(s, dataset, n) for n in range(5)]
    places = [place for some, _ in rounds for place in some]
    assert len(set(places[:40])) == 40 and places[40:] == places[:40]
    assert all(prompt in dataset.items[place][1] for some, prompts in rounds for place, prompt in zip(some, prompts))
    assert round_prompts(s, dataset, 3) == rounds[3] and round_prompts(dataclasses.replace(s, seed=1), dataset, 3) != rounds[3]


# --------------------------------------------------------------------------------------------------------------------- tuning
def tuned_copy(world, **change):
    painter = sample.load_run(world / "base", "cpu", "fp32")
    pictures = torch.from_numpy(some_pictures(6)).permute(0, 3, 1, 2).contiguous()
    return painter, settings(world, **change), pictures, [f"picture {i}" for i in range(6)]


def test_only_attention_is_tuned_by_as_many_ranks_as_asked(world, painter, tmp_path):
    tuned, s, pictures, prompts = tuned_copy(world)
    fine_rewards.tune(s, tuned, pictures, prompts, tmp_path, 0, None)
    before, after = painter.model.state_dict(), tuned.model.state_dict()
    assert set(before) == set(after) and not any(parameter.requires_grad for parameter in tuned.model.parameters())
    attention = {f"{path}.{name}" for path, module in painter.model.named_modules() if isinstance(module, uvit_fusion.Attention)
                 for name in ("qkv.weight", "proj.weight")}
    assert len(attention) == 2 * 6
    for name in before:
        change = after[name] - before[name]
        assert bool(change.any()) == (name in attention), name
        if name in attention:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == s.rank


def test_in_training_no_matrix_but_those_of_lora_gets_a_gradient(world, tmp_path, monkeypatch):
    tuned, s, pictures, prompts = tuned_copy(world, steps=1)
    networks, plain = [], uvit_fusion.Diffusion.loss

    def loss(self, network, *given):
        networks.append(network.func)
        return plain(self, network, *given)
    monkeypatch.setattr(uvit_fusion.Diffusion, "loss", loss)
    before = {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    monkeypatch.setattr(common, "merge_lora", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))        # just before merging
    with pytest.raises(KeyboardInterrupt):
        fine_rewards.tune(s, tuned, pictures, prompts, tmp_path, 0, None)
    assert {name.split(".")[-1] for name, parameter in networks[0].named_parameters() if parameter.grad is not None} == {"A", "B"}
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned.model.state_dict().items())
    kept = {name.replace("parametrizations.weight.original", "weight"): tensor for name, tensor in networks[0].state_dict().items()}
    assert all(torch.equal(before[name], kept[name]) for name in before)


@pytest.mark.parametrize("drop, share", [(0.0, (0, 0)), (0.5, (0.2, 0.8)), (1.0, (1, 1))])
def test_a_picture_is_learnt_under_its_own_prompt_or_under_none(world, tmp_path, monkeypatch, drop, share):
    tuned, s, pictures, prompts = tuned_copy(world, steps=10, drop=drop)
    read, seen, encoder, plain = [], [], tuned.encoder, uvit_fusion.Diffusion.loss
    tuned.encoder = lambda texts: read.append(texts) or encoder(texts)

    def loss(self, network, x_0, *more):
        seen.append([next(i for i in range(6) if torch.equal(common.to_float(pictures[i]), x)) for x in x_0])
        return plain(self, network, x_0, *more)
    monkeypatch.setattr(uvit_fusion.Diffusion, "loss", loss)
    fine_rewards.tune(s, tuned, pictures, prompts, tmp_path, 0, None)
    pairs = [(i, text) for places, texts in zip(seen, read) for i, text in zip(places, texts)]
    assert len(pairs) == 40 and all(text in ("", prompts[i]) for i, text in pairs)
    assert share[0] <= np.mean([text == "" for _, text in pairs]) <= share[1]
    assert sorted(i for i, _ in pairs[:36]) == sorted(6 * list(range(6)))      # each as often as the others


def test_a_loss_that_is_no_number_ends_in_one_line(world, tmp_path):
    tuned, s, pictures, prompts = tuned_copy(world, lr=1e30, clip_grad=0.0)
    with pytest.raises(UserError, match="the loss is .* round 1: try a lower --lr"):
        fine_rewards.tune(s, tuned, pictures, prompts, tmp_path, 0, None)


# --------------------------------------------------------------------------------------------------------------------- rounds
def rounds(world, folder, samples=8, painter=None, **change):
    """All rounds of a run, without the grading at its end; returns the painter."""
    options = {name: change.pop(name) for name in ("resume", "overwrite") if name in change}
    s, painter = settings(world, **change), painter or sample.load_run(world / "base", "cpu", "fp32")
    s = dataclasses.replace(s, base_identity=painter.identity())
    fine_rewards.run(s, painter, painter.data(s.data, "train"), s.data, folder, common.Options(**options), samples)
    return painter


@pytest.fixture(scope="module")
def whole(world):
    """A run of two rounds that nothing interrupts."""
    painter = rounds(world, world / "whole")
    return SimpleNamespace(folder=world / "whole", painter=painter, model=(world / "whole" / "model.safetensors").read_bytes(),
                           rewards=(world / "whole" / "rewards.csv").read_text())


def test_a_run_leaves_what_is_needed_to_draw_to_go_on_and_to_look_at_it(whole, painter):
    for name in ("config.json", "uvit.json", "state.pt", "rewards.csv", "rewards.png", "round1.safetensors", "round1/candidates.npy",
                 "round1/candidates.json", "round1/scores.npy", "round1/chosen.pt", "round2/candidates.npy",
                 "samples/round1.png", "samples/round2.png", "metrics1.csv"):
        assert (whole.folder / name).stat().st_size > 0, name
    assert not list(whole.folder.rglob("*.unfinished"))
    assert torch.load(whole.folder / "state.pt", weights_only=True) == {"round": 2, "precision": "torch.float32"}
    assert (whole.folder / "round2.safetensors").read_bytes() == whole.model
    assert np.load(whole.folder / "round1" / "candidates.npy").shape == (5, 3, 24, 24, 3)
    assert np.load(whole.folder / "round1" / "scores.npy").shape == (5, 3, 3)
    assert set(load_file(whole.folder / "model.safetensors")) == set(painter.model.state_dict())
    rows = list(csv.DictReader(whole.rewards.splitlines()))
    assert list(rows[0]) == ["round", "judged", "caption", "sam", "clip"] and [row["round"] for row in rows] == ["0", "1", "2"]
    config = json.loads((whole.folder / "config.json").read_text())
    assert config["method"] == "fine_rewards" and config["base_identity"] == painter.identity()


def test_every_round_begins_with_what_the_last_one_left(world, whole, painter):
    identities = [json.loads((whole.folder / f"round{n}" / "candidates.json").read_text())["network"] for n in (1, 2)]
    first = sample.load_run(whole.folder / "round1.safetensors", "cpu", "fp32")
    assert identities == [common.fingerprint(painter.model), common.fingerprint(first.model)] and identities[0] != identities[1]


def test_a_run_is_loaded_and_draws_as_what_was_tuned(world, whole, painter):
    loaded = sample.load_run(whole.folder, "cpu", "fp32")
    drawn, before = loaded.draw(PROMPTS, steps=2), painter.draw(PROMPTS, steps=2)
    assert np.array_equal(drawn, whole.painter.draw(PROMPTS, steps=2)) and not np.array_equal(drawn, before)
    status, _, errors = run("sample.py", PROMPTS[0], "--run", "whole", "--sample-steps", 2, "--singles", "--device", "cpu", "--precision", "fp32",
                            cwd=world)
    assert status == 0, errors
    assert np.array_equal(np.asarray(Image.open(whole.folder / "samples" / "prompts_0000.png")), drawn[0])


def seeded(seed):
    return lambda *_, **more: more.get("seed") == seed


# where a Ctrl-C comes, the how-manyth of such calls it meets, whether the run ends its step first, and the (round, step) that it saves
CUTS = {
    "the first look": (grade, "judged", None, 1, False, (0, None)),
    "drawing": (uvit_fusion.Painter, "draw", seeded(1), 2, False, (0, None)),
    "drawing in the second round": (uvit_fusion.Painter, "draw", seeded(2), 2, False, (1, None)),
    "scoring": (Rewards, "__call__", lambda self, pictures, prompts: len(pictures) == 6, 2, False, (0, None)),
    "a picture of a round": (fine_rewards, "draw_round", None, 2, False, (1, None)),
    "learning": (uvit_fusion.Diffusion, "loss", None, 2, True, (0, 2)),
    "learning in the second round": (uvit_fusion.Diffusion, "loss", None, 5, True, (1, 2)),
    "the last step of a round": (uvit_fusion.Diffusion, "loss", None, 3, True, (0, 3)),
    "saving the second round": (common, "save_tensors", None, 4, False, (1, None)),
    "the word that a round is done": (fine_rewards, "save_state", None, 2, False, (0, None)),
    "the look at a round": (grade, "judged", None, 2, False, (1, None))}


@pytest.mark.parametrize("place", CUTS)
def test_a_run_that_was_interrupted_goes_on_and_ends_as_one_that_was_not(world, whole, tmp_path, monkeypatch, capsys, place):
    (owner, name, when, number, polite, saved), calls = CUTS[place], []

    def interrupted(*given, plain=getattr(owner, name), **more):
        if when is None or when(*given, **more):
            calls.append(1)
            if len(calls) == number and not polite:
                raise KeyboardInterrupt
            if len(calls) == number:
                signal.raise_signal(signal.SIGINT)
        return plain(*given, **more)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            rounds(world, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["round"], state.get("step")) == saved and ("--resume" in capsys.readouterr().out) == polite
    rounds(world, tmp_path / "run", resume=True)
    out = capsys.readouterr().out
    assert "beginning anew" not in out and ("of 5 prompts are done already" in out) == ("drawing" in place or "scoring" in place)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole.model
    assert (tmp_path / "run" / "rewards.csv").read_text() == whole.rewards


def test_a_finished_run_has_nothing_to_go_on_with(world, whole, monkeypatch):
    for name in ("tune", "best_of_round"):
        monkeypatch.setattr(fine_rewards, name, None)
    painter = rounds(world, whole.folder, resume=True)
    assert (whole.folder / "model.safetensors").read_bytes() == whole.model and (whole.folder / "rewards.csv").read_text() == whole.rewards
    assert all(torch.equal(tensor, painter.model.state_dict()[name]) for name, tensor in load_file(whole.folder / "model.safetensors").items())


def test_a_new_run_over_an_old_one_keeps_nothing_of_it(world, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    rounds(world, tmp_path / "run", overwrite=True, rounds=1, choose="real", weights=(0.0,) * 4)
    assert [file.name for file in tmp_path.glob("run/round?/*")] == ["chosen.pt"] and not (tmp_path / "run" / "round2.safetensors").exists()
    assert (tmp_path / "run" / "rewards.csv").read_text().splitlines()[0] == "round,judged"


def test_a_run_does_not_go_on_from_another_base_or_with_other_settings(world, whole):
    other = sample.load_run(world / "base", "cpu", "fp32")
    next(other.model.parameters()).data += 1
    with pytest.raises(UserError, match="was begun from .*base as it was then.*--overwrite"):
        rounds(world, whole.folder, resume=True, painter=other)
    with pytest.raises(UserError, match="candidates = 3, now it is 4"):
        rounds(world, whole.folder, resume=True, candidates=4)
    with pytest.raises(UserError, match="trained in torch.float32, now it would be in torch.bfloat16"):
        rounds(world, whole.folder, resume=True, painter=sample.load_run(world / "base", "cpu", "bf16"))


def test_a_round_learns_from_what_was_chosen_in_all_rounds_so_far(world, whole, monkeypatch, tmp_path):
    learnt, rights = [], []
    monkeypatch.setattr(fine_rewards, "tune", lambda s, painter, pictures, prompts, *more, plain=fine_rewards.tune:
                        learnt.append((pictures, prompts)) or plain(s, painter, pictures, prompts, *more))
    rounds(world, tmp_path / "run")
    for n in (1, 2):
        chosen = torch.load(tmp_path / "run" / f"round{n}" / "chosen.pt", weights_only=True)
        rights.append((chosen["pictures"], chosen["prompts"]))
    assert torch.equal(learnt[0][0], rights[0][0]) and learnt[0][1] == rights[0][1]
    assert torch.equal(learnt[1][0], torch.cat([rights[0][0], rights[1][0]])) and learnt[1][1] == rights[0][1] + rights[1][1]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole.model


def test_candidates_are_needed_no_more_once_the_best_are_chosen(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / "run")
    for file in (*tmp_path.glob("run/round?/candidates.*"), *tmp_path.glob("run/round?/scores.*"), tmp_path / "run" / "round2.safetensors"):
        file.unlink()
    torch.save({"round": 1, "precision": "torch.float32"}, tmp_path / "run" / "state.pt")
    monkeypatch.setattr(fine_rewards, "best_of_round", None)
    rounds(world, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole.model
    torch.save({"round": 1, "precision": "torch.float32"}, tmp_path / "run" / "state.pt")
    (tmp_path / "run" / "round1" / "chosen.pt").unlink()
    with pytest.raises(UserError, match="round1/chosen.pt is gone"):
        rounds(world, tmp_path / "run", resume=True)


@pytest.mark.parametrize("change", [
    dict(choose="sum"), dict(weights=(0.0, 0.0, 0.0, 1.0)), dict(keep=0.4), dict(prompts=1), dict(candidates=1), dict(choose="random"),
    dict(weights=(0.0, 1.0, 0.0, 0.0), sam="sam", prompts=2, candidates=2), dict(instruction="paper")])
def test_every_kind_of_run_runs(world, tmp_path, monkeypatch, change):
    monkeypatch.chdir(world)
    learnt = []
    monkeypatch.setattr(fine_rewards, "tune", lambda s, painter, pictures, *more, plain=fine_rewards.tune: learnt.append(len(pictures))
                        or plain(s, painter, pictures, *more))
    rounds(world, tmp_path / "run", **dict(rounds=1, steps=1) | change)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model.safetensors").values())
    assert learnt == [max(1, round(change.get("keep", 1) * change.get("prompts", 5)))]
    assert Image.open(tmp_path / "run" / "samples" / "round1.png").width > 96 * change.get("candidates", 3)


@pytest.mark.parametrize("how", ["real", "random"])
def test_real_and_random_need_no_rewards(world, dataset, tmp_path, monkeypatch, how):
    learnt = []
    monkeypatch.setattr(fine_rewards, "tune", lambda s, painter, pictures, prompts, *_: learnt.append((pictures, prompts)))
    nowhere = dict.fromkeys(("captioner", "segmenter", "llm", "scorer"), "/nowhere")
    rounds(world, tmp_path / "run", rounds=1, choose=how, weights=(0.0,) * 4, **nowhere)
    (pictures, prompts), (places, expected) = learnt[0], round_prompts(settings(world), dataset, 0)
    assert prompts == expected and (tmp_path / "run" / "round1" / "candidates.npy").exists() == (how == "random")
    if how == "real":
        assert torch.equal(pictures, torch.stack([dataset.picture(i) for i in places]))
    else:
        candidates = np.load(tmp_path / "run" / "round1" / "candidates.npy")
        assert all((candidates[i] == picture.permute(1, 2, 0).numpy()).all((1, 2, 3)).any() for i, picture in enumerate(pictures))


def test_a_photograph_that_cannot_be_read_is_left_out_of_the_real_ones(world, dataset, tmp_path, monkeypatch, capsys):
    broken, plain, learnt = [], common.CaptionedImages.picture, []

    def picture(self, i):
        if len(broken) < 2 or i in broken:
            broken.append(i)
            raise OSError("image file is truncated")
        return plain(self, i)
    monkeypatch.setattr(common.CaptionedImages, "picture", picture)
    monkeypatch.setattr(fine_rewards, "tune", lambda s, painter, pictures, prompts, *_: learnt.append((pictures, prompts)))
    rounds(world, tmp_path / "run", rounds=1, choose="real", weights=(0.0,) * 4)
    places, prompts = round_prompts(settings(world), dataset, 0)
    assert broken == places[:2] and learnt[0][1] == prompts[2:] and len(learnt[0][0]) == 3
    assert capsys.readouterr().out.count("cannot be read (image file is truncated) and is left out") == 2
    monkeypatch.setattr(common.CaptionedImages, "picture", lambda *_: (_ for _ in ()).throw(OSError("truncated")))
    with pytest.raises(UserError, match="none of 5 pictures could be read"):
        rounds(world, tmp_path / "none", rounds=1, choose="real", weights=(0.0,) * 4)


def test_what_is_learnt_is_the_best_of_each_prompt_under_that_prompt(world, whole, tmp_path, monkeypatch):
    learnt = []
    monkeypatch.setattr(fine_rewards, "tune", lambda s, painter, pictures, prompts, *_: learnt.append((pictures, prompts)))
    rounds(world, tmp_path / "run", rounds=1, keep=0.6)
    candidates, scores = (np.load(tmp_path / "run" / "round1" / f"{name}.npy") for name in ("candidates", "scores"))
    prompts = json.loads((tmp_path / "run" / "round1" / "candidates.json").read_text())["prompts"]
    best = [np.sum([plain_ranks(values.tolist()) for values in scores[i].T], 0).argmin() for i in range(5)]
    assert len(learnt[0][1]) == len(learnt[0][0]) == 3
    for picture, prompt in zip(*learnt[0]):
        i = prompts.index(prompt)
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), candidates[i, best[i]])


def test_the_picture_of_a_round_shows_the_candidates_as_they_were_ranked(world, whole, painter, tmp_path, monkeypatch):
    candidates, scores = (np.load(whole.folder / "round1" / f"{name}.npy") for name in ("candidates", "scores"))
    prompts, shown = json.loads((whole.folder / "round1" / "candidates.json").read_text())["prompts"], []
    monkeypatch.setattr(sample, "picture_grid", lambda *given, **more: shown.append((given, more)))
    scores = {name: scores[..., i] for i, name in enumerate(("caption", "sam", "clip"))}
    for how in ("ranks", "sum"):
        s = settings(world, choose=how)
        fine_rewards.draw_round(s, painter, rewards_of(world, painter), candidates, scores, prompts, tmp_path / "round.png", columns=2)
        (pictures, texts, _), more = shown.pop()
        order = assemble(s, scores).argsort(axis=1, kind="stable")
        assert more["titles"] == prompts[:2] and len(pictures) == len(texts) == 6 and np.array_equal(order[:, 0], choose(s, scores, 5, 0)[1])
        for n, (picture, text) in enumerate(zip(pictures, texts)):
            i, k = n // 3, order[n // 3, n % 3]
            drawn = np.kron(candidates[i, k], np.ones((4, 4, 1), np.uint8))
            assert ((picture == drawn) | (picture == 0)).all() and text.startswith(f"{n % 3 + 1}. ") and f"clip {scores['clip'][i, k]:.2f}" in text


def test_a_base_that_sees_latents_is_tuned_too(world, clip_folder, tmp_path):
    torch.manual_seed(0)
    torch.save(Autoencoder(32, (1, 1), 1).state_dict(), tmp_path / "autoencoder.pth")
    make_coco(tmp_path / "coco")
    flags = [*TINY, "--no-clip-x0", "--channels", 4, "--latent-scale", 0.5, "--autoencoder", tmp_path / "autoencoder.pth"]
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "coco", "--clip", clip_folder, "--steps", 1, "--out", "base", *flags, cwd=tmp_path)
    assert status == 0, errors
    painter = sample.load_run(tmp_path / "base", "cpu", "fp32")
    pictures = some_pictures(3, 32)
    moments, expected = as_data(painter, pictures), painter.autoencoder.encode(common.to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
    assert moments.dtype == torch.float16 and moments.shape == (3, 2, 4, 16, 16)
    assert torch.allclose(moments.float(), torch.stack(expected, dim=1), atol=1e-2)
    experts_ = [flag for name in ("captioner", "segmenter", "llm") for flag in (f"--{name}", world / name)]
    for how in (["--choose", "ranks"], ["--choose", "real", "--weights", 0, 0, 0, 0]):
        status, out, errors = run("fine_rewards.py", "--train", "--base", "base", "--data", "coco", *experts_, *SMALL, "--rounds", 1, *how,
                                  "--out", how[1], cwd=tmp_path)
        assert status == 0, errors
        painter = sample.load_run(tmp_path / how[1], "cpu", "fp32")
        assert painter.draw(["a man"], steps=1).shape == (1, 32, 32, 3) and (tmp_path / how[1] / "samples" / "validation.png").exists()
        assert not (tmp_path / how[1] / "rewards.png").exists()               # nobody judges photographs


# -------------------------------------------------------------------------------------------------------- grading and the commands
SMALL = ["--keep", 1, "--weights", 1, 1, 1, 0, "--candidates", 2, "--prompts", 4, "--rounds", 2, "--sample-steps", 1, "--steps", 2, "--batch", 2,
         "--rank", 2, "--samples", 6, "--device", "cpu", "--precision", "fp32"]


def command(world, *flags, out="new", what="--train"):
    named = [flag for name in ("base", "captioner", "segmenter", "llm") for flag in (f"--{name}", name)]
    return run("fine_rewards.py", what, *named, "--scorer", "scorer.safetensors", "--data", "shapes", "--out", out, *SMALL, *flags, cwd=world)


def test_diversity_is_the_mean_distance_between_pictures_of_a_caption(painter):
    clip, drawn = grade.ClipScorer(painter.settings.clip), some_pictures(6)
    x, pixels = clip.images(drawn).view(2, 3, -1), drawn.reshape(2, 3, -1) / 255
    pairs = [(c, i, j) for c in range(2) for i in range(3) for j in range(3) if i != j]
    of_pixels, of_features = diversity(drawn, clip, each=3)
    assert math.isclose(of_pixels, np.mean([np.square(pixels[c, i] - pixels[c, j]).mean()**0.5 for c, i, j in pairs]), rel_tol=1e-3)
    assert math.isclose(of_features, np.mean([1 - F.cosine_similarity(x[c, i], x[c, j], dim=0) for c, i, j in pairs]), rel_tol=1e-3)
    assert max(diversity(np.repeat(some_pictures(2), 3, 0), clip, 3)) < 1e-5


def test_real_pictures_of_one_caption_are_all_right_and_all_different(world, painter, monkeypatch):
    seen = []
    monkeypatch.setattr(fine_rewards, "diversity", lambda pictures, clip, each: seen.append(pictures) or (0.5, 0.25))
    found = fine_rewards.real_diversity(painter.settings.clip, world / "data" / "shapes", 24, few=4, each=3)
    scenes = grade.validation_prompts(world / "data" / "shapes", 24, 4)[0]
    assert found == {"diversity": 0.5, "clip_diversity": 0.25} and len(np.unique(seen[0].reshape(12, -1), axis=0)) == 12
    assert grade.judged(seen[0], [scene for scene in scenes for _ in range(3)], [False, True] * 6)[1]["all"].all()


def test_a_run_on_the_toy_world_ends_with_its_figures(world):
    status, out, errors = command(world, out="graded")
    assert status == 0, errors
    figures = json.loads((world / "graded" / "results.json").read_text())
    expected = {"start", "start_ci", "final", "final_ci", "gain", "gain_ci", "distance_start", "distance_final", "seconds", "commit", "machine",
                "command", "start_own", "start_own_ci", *(f"{clip}diversity_{when}" for clip in ("", "clip_") for when in ("start", "final", "real"))}
    assert expected == set(figures) and abs(figures["gain"] - (figures["final"] - figures["start"])) < 0.01
    for words in ("pictures a second", "share of the time, %", "caption", "chosen", "gained, picture by picture"):
        assert words in out, words
    refused(command(world, out="graded"), "graded/ holds a run already", "--resume")
    status, out, errors = command(world, "--resume", out="graded")
    assert status == 0 and "learning" not in errors, errors


def test_a_run_draws_candidates_with_one_guidance_and_its_pictures_with_another(world, painter):
    status, _, errors = command(world, "--candidate-guidance", 3, "--guidance", 2, "--rounds", 1, out="guided")
    assert status == 0, errors
    prompts = json.loads((world / "guided" / "round1" / "candidates.json").read_text())["prompts"]
    first = np.load(world / "guided" / "round1" / "candidates.npy")[0]
    drawn = {w: painter.draw(prompts[:1] * 2, steps=1, guidance=w, seed=1).astype(int) for w in (1, 2, 3)}
    assert np.abs(drawn[3] - first).max() <= 1 < min(np.abs(drawn[w] - first).max() for w in (1, 2))
    assert sample.load_run(world / "guided", "cpu", "fp32").settings.guidance == 2 and painter.settings.guidance == 1


def test_all_ways_to_choose_are_compared_in_one_table_and_finished_ones_are_kept(world, monkeypatch):
    few = ["--rounds", 1, "--steps", 1, "--prompts", 2]
    status, out, errors = command(world, *few, what="--compare", out="compared")
    assert status == 0, errors
    figures = json.loads((world / "compared" / "results.json").read_text())
    names = ["start", "real_pictures", "random", "clip_only", "caption_only", "sam_only", "sum", "rank_sum", "gain_over_random"]
    assert all({name, f"{name}_ci"} <= set(figures) for name in names)
    table = out.split("all right, %")[-1].split("rank_sum is ahead")[0]
    assert [row.split()[0] for row in table.splitlines() if row and row.split()[0] in names] == names[:-1]
    configs = {name: json.loads((world / "compared" / name / "config.json").read_text()) for name in names[1:-1]}
    assert len({json.dumps({key: value for key, value in config.items() if key not in ("choose", "weights")}) for config in configs.values()}) == 1
    monkeypatch.setattr(fine_rewards, "tune", None)
    status, again, errors = command(world, *few, what="--compare", out="compared")
    assert status == 0 and again.split("all right, %")[-1] == out.split("all right, %")[-1], errors
    refused(command(world, *few, "--seed", 1, what="--compare", out="compared"), "was made with seed = 0, now it is 1")
    monkeypatch.undo()
    status, other, errors = command(world, *few, "--seed", 1, "--overwrite", what="--compare", out="compared")
    assert status == 0 and json.loads((world / "compared" / "sum" / "config.json").read_text())["seed"] == 1, errors


def test_a_reward_that_always_prefers_the_right_caption_is_said_to(world, painter, monkeypatch, capsys):
    told = set(grade.validation_prompts(world / "data" / "shapes", 24, 8)[1])

    def scores(self, pictures, prompts):
        right = np.array([float(prompt in told) for prompt in prompts])
        return {"caption": right, "sam": 0 * right, "clip": -right}, [], []
    monkeypatch.setattr(Rewards, "__call__", scores)
    figures = fine_rewards.analyse(settings(world, weights=(1.0, 1.0, 0.5, 0.0)), painter, world / "data" / "shapes", 8)
    for field in ("count", "colour", "shape", "relation"):
        assert [figures[f"{field}_{name}"] for name in ("caption", "sam", "clip", "all")] == [100, 50, 0, 100]
    assert "right above wrong" in capsys.readouterr().out


def test_analysing_leaves_its_figures(world):
    status, out, errors = command(world, what="--analyse", out="analysed")
    figures = json.loads((world / "analysed" / "results.json").read_text())
    assert status == 0 and all(0 <= figures[f"{field}_clip"] <= 100 for field in ("count", "colour", "shape", "relation")), errors


@pytest.mark.parametrize("flags, said", [
    (["--captioner", "segmenter"], ["--captioner segmenter", "cannot be loaded as a captioner"]),
    (["--captioner", "/nowhere"], ["--captioner /nowhere"]),
    (["--segmenter", "llm"], ["--segmenter llm", "segmenter"]), (["--segmenter", "captioner"], ["--segmenter captioner"]),
    (["--sam", "segmenter"], ["--sam segmenter"]), (["--sam", "nowhere"], ["--sam nowhere"]), (["--llm", "captioner"], ["--llm captioner"]),
    (["--llm", "./nowhere"], ["--llm ./nowhere", "no such folder"]), (["--clip-model", "llm"], ["--clip-model llm"]),
    (["--scorer", "nowhere.safetensors", "--weights", 0, 0, 0, 1], ["--scorer nowhere.safetensors"]),
    (["--scorer", "base/model.safetensors", "--weights", 0, 0, 0, 1], ["--scorer base/model.safetensors", "no linear head"]),
    (["--weights", 0, 0, 0, 0], ["--weights", "above 0"]), (["--weights", 1, -1, 0, 0], ["--weights -1.0"]),
    (["--instruction", "is it in {prompt}?"], ["--instruction", "{label}"]), (["--keep", 0], ["--keep 0.0", "more than 0"]),
    (["--choose", "best"], ["--choose best", "ranks"]), (["--preset", "huge"], ["--preset huge", "toy"]), (["--resume"], ["--resume", "state.pt"]),
    (["--base", "nowhere"], ["nowhere"]), (["--base", "base/other.safetensors"], ["base/other.safetensors"]), (["--data", "nowhere"], ["nowhere"]),
    (["--compare"], ["--compare", "not allowed with", "--train"]), (["--samples", 1], ["--samples 1"]),
    (["--candidates", 0], ["--candidates 0"]), (["--rounds", 0], ["--rounds 0"])])
def test_slips_end_in_one_line_and_leave_no_folder(world, flags, said):
    refused(command(world, *flags), *said)
    assert not (world / "new").exists()


def test_a_base_that_reads_text_in_another_way_is_refused(world, painter, monkeypatch):
    other = copy.copy(painter)
    other.encoder = lambda texts: None
    monkeypatch.setattr(sample, "load_or_train", lambda *_: other)
    refused(command(world), "base/ is a run of an adapter", "name a run of uvit_fusion.py")


def test_without_a_flagship_it_is_trained_first(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample.subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(returncode=7))
    monkeypatch.setattr(toy, "prepare", None)
    status, out, _ = run("fine_rewards.py", "--train", cwd=tmp_path)
    assert status == 7 and "training it first" in out and "--train" in asked[0] and str(asked[0][1]).endswith("uvit_fusion.py")


def test_without_a_flag_comes_the_help(world):
    status, out, _ = run("fine_rewards.py", cwd=world)
    assert status == 0 and all(flag in out for flag in ("--train", "--compare", "--analyse"))
