"""Fine-grained rewards: how ranks choose, what each reward is, what a round learns, and a run."""
import dataclasses
import json
import math
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_coco, refused, run, save_run, tiny_pipeline
from gpu import DEVICE
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import import_utils

import common
import fine_rewards
import image_data
import sample
import segmenter
import uvit_fusion
from autoencoder import Autoencoder
from common import UserError
from experiments import fine_rewards as experiments
from fine_rewards import Rewards, aggregate_ranks, finetune_lora, raft, ranks, score, select_best
from toy import gain, judge, shapes
from toy.models import train_tokenizer

CPU = torch.device("cpu")
NEW = SimpleNamespace(resume=False, overwrite=True)
RESUME = SimpleNamespace(resume=True, overwrite=False)
PROMPTS = ["two red circles above a blue square", "a man on a horse", "a blue square", "a disc"]
LABELS = ["red circle", "blue square", "a horse"]
EQUAL = {"caption": 1.0, "sam": 1.0, "clip": 1.0}                 # weights of the ranks


# --------------------------------------------------------------------------------------- ranks
def test_the_best_rank_is_0_and_equals_share_their_mean_rank():
    assert ranks(np.array([0.1, 0.9, 0.5, 0.3])).tolist() == [3, 0, 1, 2]
    assert ranks(np.array([0.5, 0.9, 0.5, 0.1, 0.5])).tolist() == [2, 0, 2, 4, 2]
    assert ranks(np.zeros((2, 4))).tolist() == [[1.5] * 4] * 2


def test_the_chosen_candidate_has_the_smallest_weighted_sum_of_ranks():
    scores = {"caption": np.array([[0.9, 0.5, 0.1], [0.1, 0.2, 0.3]]),
              "clip": np.array([[0.3, 0.9, 0.8], [0.6, 0.5, 0.4]])}
    assert aggregate_ranks(scores, EQUAL).tolist() == [[2, 1, 3], [2, 2, 2]]
    assert select_best(scores, EQUAL, keep=1.0)[1].tolist() == [1, 0]       # of ties, the first
    weights = {"caption": 3.0, "clip": 1.0}
    assert aggregate_ranks(scores, weights).tolist() == [[2, 3, 7], [6, 4, 2]]
    assert select_best(scores, weights, keep=1.0)[1].tolist() == [0, 2]


def test_kept_are_the_prompts_whose_best_candidates_rank_best_among_all():
    scores = {"clip": np.array([[0.5, 0.2], [0.3, 0.9], [0.0, 0.1], [0.7, 0.6], [0.2, 0.7]])}
    kept, candidates = select_best(scores, EQUAL, keep=0.55)           # 2.75 of 5
    assert kept.tolist() == [1, 3, 4] and candidates.tolist() == [1, 0, 1]
    assert select_best(scores, EQUAL, keep=0.45)[0].tolist() == [1, 3]      # 2.25 of 5
    assert select_best(scores, EQUAL, keep=0.01)[0].tolist() == [1]         # at least one
    scores = {"clip": np.array([[9.0, 1], [3, 1], [2, 1], [1, 0]]),
              "caption": np.array([[0.1, 0], [0.4, 0], [0.3, 0], [0.2, 0]])}
    both = {"clip": 1.0, "caption": 1.0}
    assert select_best(scores, both, 0.25)[0].tolist() == [1], "winners are compared by rank"
    both["caption"] = 3.0
    assert select_best(scores, both, 0.5)[0].tolist() == [1, 2], "by the same weights"
    both = {"clip": 2.0, "caption": 1.0}
    assert select_best(scores, both, 0.5)[0].tolist() == [0, 1], "in ascending order"


# ------------------------------------------------------------------------------------- rewards
def parts_of(*labels):
    return [(label, np.ones((2, 2), bool)) for label in labels]


def test_the_sam_reward_is_its_formula_and_each_label_meets_its_own_prompt():
    table = {("p", "a"): 3.0, ("p", "b"): 1.5, ("q", "a"): 1.0, ("q", "c"): 2.5}
    parts = [parts_of("a", "b"), parts_of("a"), parts_of(), parts_of("a", "a", "c")]
    calls = []

    def scorer(pairs):
        calls.append(pairs)
        return np.array([table[pair] for pair in pairs])
    rewards = fine_rewards.sam_reward(parts, ["p", "q", "p", "q"], scorer)
    assert len(calls) == 1, "one call for all pairs"
    assert np.allclose(rewards, [(4.5 - 4) / 4, (1 - 2) / 2, -0.5, (4.5 - 6) / 6])


def test_each_candidate_is_scored_against_its_own_prompt():
    candidates = np.zeros((2, 3, 4, 4, 3), np.uint8)
    candidates[..., 0] = np.array([[10, 11, 12], [20, 21, 22]])[:, :, None, None]

    def read(images, prompts):                        # 1000 times the number of the prompt
        numbers = np.array([PROMPTS.index(prompt) for prompt in prompts])
        return {"clip": images[:, 0, 0, 0] + 1000.0 * numbers}
    scores = score(read, candidates, [PROMPTS[1], PROMPTS[3]])
    assert scores["clip"].tolist() == [[1010, 1011, 1012], [3020, 3021, 3022]]


# small models with random weights, in the formats of the real ones
TRANSFORMER = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)


def save(folder, model_class, config, processor, noise=0.2):
    torch.manual_seed(3)
    model = model_class(config)
    for parameter in model.parameters():    # freshly initialised, most treat all images alike
        parameter.data += noise * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_captioner(folder):
    tokenizer = train_tokenizer(PROMPTS, 300)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0,
                bos_token_id=2, eos_token_id=3, sep_token_id=3)
    config = transformers.BlipConfig(
        vision_config=TRANSFORMER | dict(image_size=24, patch_size=8),
        text_config=TRANSFORMER | text)
    images = transformers.BlipImageProcessorPil(size={"height": 24, "width": 24})
    save(folder, transformers.BlipForConditionalGeneration, config,
         transformers.BlipProcessor(images, tokenizer))


def save_segmenter(folder, names=("background", *LABELS)):
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3],
        strides=[1, 2], sr_ratios=[4, 2], num_attention_heads=[1, 1], mlp_ratios=[2, 2],
        decoder_hidden_size=8, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)})
    save(folder, transformers.SegformerForSemanticSegmentation, config,
         transformers.SegformerImageProcessorPil(size={"height": 24, "width": 24}))


def save_llm(folder, texts=PROMPTS):
    config = transformers.LlamaConfig(
        vocab_size=300, num_key_value_heads=1, max_position_embeddings=64, **TRANSFORMER)
    save(folder, transformers.LlamaForCausalLM, config,
         train_tokenizer(texts, 300, 64, "<|start|> $A"))


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip_folder):
    """A folder with a small toy world, a random base, and experts that have learned nothing."""
    folder = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    shapes.build(folder / "data" / "shapes", 24, train=40, val=16)
    shapes.build_quality(folder / "data" / "shapes", 24, count=4)
    save_run(tiny_pipeline(clip_folder, size=24, patch=8), folder / "base")
    save_captioner(folder / "captioner")
    save_segmenter(folder / "segmenter")
    save_llm(folder / "llm")
    head = {"weight": torch.randn(1, 32), "bias": torch.randn(1)}
    common.save_tensors(head, folder / "scorer.safetensors")
    return folder


def small(world, **changes):
    experts = {name: str(world / name) for name in ("base", "captioner", "segmenter", "llm")}
    fields = dict(candidates=3, prompts=5, sample_steps=2, steps=3, batch_size=4, rank=2, warmup=0,
                  lr=1e-2, keep=0.6, real=0.0, scorer=str(world / "scorer.safetensors"),
                  instruction="{prompt} {label}", weights=(1.0, 1.0, 1.0, 0.0))
    return fine_rewards.Config(**experts | fields | changes)


def load_base(world):
    return uvit_fusion.load_pipeline(world / "base", CPU, torch.float32)


def some_images(count, side=24):
    """Of large patches, so that a segmenter of random weights finds parts in them."""
    coarse = np.random.default_rng(0).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    nearest = Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(x).resize((side, side), nearest)) for x in coarse])


@pytest.fixture(scope="module")
def rewards(world):
    return Rewards(small(world, weights=(1.0,) * 4, score_batch=3), load_base(world))


def test_rewards_are_what_they_are_called(world, rewards):
    images = some_images(4)
    scores = rewards(images, PROMPTS)
    captions = rewards.captioner(images)
    parts = rewards.segmenter(images)
    head = load_file(world / "scorer.safetensors")
    assert list(scores) == list(fine_rewards.REWARDS) and len(set(captions)) > 1 and any(parts)
    for i, prompt in enumerate(PROMPTS):
        image = rewards.clip.images(images[i:i + 1])[0]
        text, caption = rewards.clip.texts([prompt, captions[i]])
        s = rewards.label_scorer([(prompt, label) for label, _ in parts[i]])
        expected = {"caption": F.cosine_similarity(caption, text, dim=0),
                    "sam": (s.sum() - 2 * len(s)) / (2 * len(s)) if len(s) else -0.5,
                    "clip": F.cosine_similarity(image, text, dim=0),
                    "aesthetic": head["weight"][0] @ image + head["bias"][0]}
        for name, value in expected.items():
            assert math.isclose(scores[name][i], value, abs_tol=1e-4), name


@pytest.mark.parametrize("space_apart", [True, False])
def test_a_label_scores_its_expectation_over_1_2_3_as_the_next_token(tmp_path, space_apart):
    save_llm(tmp_path, PROMPTS if space_apart else PROMPTS + ["x: 1", "x: 2", "x: 3"] * 50)
    instruction = fine_rewards.Config.instruction
    scorer = fine_rewards.LabelScorer(str(tmp_path), instruction, CPU, torch.float32)
    pairs = [(prompt, label) for prompt in PROMPTS for label in LABELS]
    expected = []
    for prompt, label in pairs:             # alone, from the softmax over the whole vocabulary
        rows = [scorer.tokenizer(f"scene: {prompt}. {label}: {v}").input_ids for v in (1, 2, 3)]
        with torch.no_grad():
            logits = scorer.model(input_ids=torch.tensor([rows[0][:-1]])).logits[0, -1]
        p = logits.double().softmax(-1)[[row[-1] for row in rows]]
        expected.append(float(p @ torch.tensor([1.0, 2.0, 3.0]).double() / p.sum()))
    assert np.allclose(scorer(pairs), expected, atol=1e-4) and np.std(expected) > 1e-2
    mixed = [5, 0, 5, 3]                    # neither the batch nor the order matters
    assert np.allclose(scorer([pairs[i] for i in mixed]), np.array(expected)[mixed], atol=1e-4)
    assert len(rows[0]) - len(scorer.tokenize(prompt, label)[0]) == 1


def test_a_chat_model_is_asked_in_its_own_template(world):
    scorer = fine_rewards.LabelScorer(str(world / "llm"), "a {label} in {prompt}", CPU,
                                      torch.float32)
    plain, _ = scorer.tokenize("a disc", "a horse")
    assert scorer.tokenizer.decode(plain).split()[:3] == ["<|start|>", "a", "a"]
    scorer.tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>it:{% endif %}")
    question, answers = scorer.tokenize("a disc", "a horse")
    text = scorer.tokenizer.decode(question)
    assert text.replace(" ", "") == "<|start|>user:aahorseinadisc<|end|><|start|>it:"
    assert [scorer.tokenizer.decode(answer).strip() for answer in answers] == ["1", "2", "3"]


# --------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize("names, side", [(("background", *LABELS), 32), (("sky", *LABELS), 24)])
def test_parts_are_the_connected_areas_of_the_segmenters_labels(tmp_path, names, side):
    save_segmenter(tmp_path, names)
    images = some_images(6, side)
    segmenter = fine_rewards.Segmenter(tmp_path, CPU)
    inputs = segmenter.processor(images=list(images), return_tensors="pt")
    with torch.no_grad():
        logits = segmenter.model(**inputs).logits
    classes = F.interpolate(logits, (side, side), mode="bilinear").argmax(1).numpy()
    is_part = (classes > 0) | (names[0] == "sky")
    areas = judge.components(np.where(is_part, classes + 1, 0))
    assert len(np.unique(classes)) == 4
    for labels, numbers, parts in zip(classes, areas, segmenter(images)):
        expected = {}
        for k in np.unique(numbers):
            if k and (numbers == k).mean() >= 0.012:
                expected[(numbers == k).tobytes()] = names[labels[numbers == k][0]]
        assert {mask.tobytes(): name for name, mask in parts} == expected
    assert len({name for parts in segmenter(images) for name, _ in parts}) > 1


def test_a_mask_of_sam_has_the_label_of_most_of_its_pixels(world):
    names_parts = segmenter.Segmenter(world / "segmenter", CPU)
    labels = np.zeros((20, 20), int)                  # 0 is the background
    labels[:10, :10] = 1
    labels[:10, 10:] = 3
    masks = np.zeros((4, 20, 20), bool)
    masks[0, :10, :13] = True
    masks[1, :10, 8:] = True
    masks[2, 5:] = True                               # mostly background
    masks[3, 0, :3] = True                            # a speck
    areas = [(i, labels == i) for i in (0, 1, 3)]
    names_parts.connected_areas = lambda images: [areas]
    names_parts.sam = lambda image: masks
    [parts] = names_parts(np.zeros((1, 20, 20, 3), np.uint8))
    assert [name for name, _ in parts] == [LABELS[0], LABELS[2]]
    assert np.array_equal([mask for _, mask in parts], masks[:2])


def save_sam(folder):
    size = dict(hidden_size=16, image_size=64, patch_size=4)
    config = transformers.SamConfig(
        vision_config=size | dict(output_channels=16, num_hidden_layers=1, num_attention_heads=2,
                                  mlp_dim=16, global_attn_indexes=[0], num_pos_feats=8),
        prompt_encoder_config=size | dict(mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1,
                                 num_attention_heads=2, iou_head_hidden_dim=16))
    side = {"height": 64, "width": 64}
    save(folder, transformers.SamModel, config, transformers.SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size=side), noise=0.7)


def iou_of(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_sams_masks_are_filtered_small_and_only_those_kept_are_enlarged(tmp_path, monkeypatch):
    save_sam(tmp_path)
    sam = segmenter.SamMasks(tmp_path, CPU)
    assert (sam.POINTS, sam.BATCH, sam.PREDICTED_IOU, sam.STABILITY) == (32, 16, 0.88, 0.95)
    image = some_images(1, 48)[0]
    sam.POINTS = 6
    points = torch.tensor([[(x + 0.5) * 64 / 6, (y + 0.5) * 64 / 6]
                           for x in range(6) for y in range(6)])
    pixels = sam.processor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        model = transformers.SamModel.from_pretrained(tmp_path).eval()  # whose attention is plain
        found = model(pixel_values=pixels, input_points=points[None, :, None])
    logits = found.pred_masks[0].flatten(0, 1)                                  # (108, 16, 16)
    iou = found.iou_scores[0].flatten()
    stable = torch.tensor([(x > 1).sum() / max(1, (x > -1).sum()) for x in logits])
    sam.PREDICTED_IOU = iou.quantile(0.3).item()      # of random weights, so all rules bite
    sam.STABILITY = stable.quantile(0.3).item()
    kept = []
    for i in iou.argsort(descending=True).tolist():
        good = iou[i] > sam.PREDICTED_IOU and stable[i] > sam.STABILITY
        if good and all(iou_of(logits[i] > 0, logits[j] > 0) <= 0.7 for j in kept):
            kept.append(i)
    large = F.interpolate(logits[kept][None], (48, 48), mode="bilinear")[0] > 0
    interpolate = F.interpolate
    enlarged = []

    def count(x, *more, **options):
        enlarged.append(x.shape[1])
        return interpolate(x, *more, **options)
    sam.BATCH = 5
    monkeypatch.setattr(F, "interpolate", count)
    masks = sam(image)
    assert 1 < len(kept) < 60 and enlarged[-1] == len(kept) and max(enlarged) <= 16
    assert len(masks) == len(kept) and np.mean(masks != large.numpy()) < 0.01
    sam.STABILITY = 1.1
    assert sam(image).shape == (0, 48, 48)


def test_of_masks_that_overlap_the_best_is_kept():
    masks = torch.zeros(4, 4, 10, dtype=torch.bool)
    for mask, stop in zip(masks, (10, 8, 7, 3)):      # IoU 0.8, 0.7 and 0.3 with the first
        mask[:, :stop] = True
    scores = torch.tensor([0.93, 0.92, 0.95, 0.9])
    assert segmenter.suppress(masks, scores).tolist() == [2, 0, 3]   # 7/8 > 0.7, but not 7/10
    assert segmenter.suppress(masks[:0], scores[:0]).tolist() == []
    x = torch.tensor([[[2.0, 0.5, -0.5, -2.0]]])
    assert segmenter.stability(x).item() == pytest.approx(1 / 3)


# --------------------------------------------------------------------------- universal segmenters
PANOPTIC = ("person", "dog", "sky-other-merged")


def universal(family, folder):
    """Saves a small random Mask2Former, OneFormer or EoMT that knows the labels PANOPTIC."""
    labels = dict(id2label=dict(enumerate(PANOPTIC)),
                  label2id={name: i for i, name in enumerate(PANOPTIC)})
    side = {"height": 32, "width": 32}
    if family == "eomt":
        config = transformers.EomtConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
            num_blocks=1, num_queries=6, num_upscale_blocks=1, num_register_tokens=1, mlp_ratio=1,
            **labels)
        save(folder, transformers.EomtForUniversalSegmentation, config,
             transformers.EomtImageProcessorPil(
                 size={"shortest_edge": 32, "longest_edge": 32}, do_pad=True))
        return
    swin = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"])
    small_decoder = dict(
        backbone_config=swin, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, **labels)
    if family == "mask2former":
        config = transformers.Mask2FormerConfig(
            feature_size=32, mask_feature_size=32, **small_decoder)
        save(folder, transformers.Mask2FormerForUniversalSegmentation, config,
             transformers.Mask2FormerImageProcessorPil(size=side))
        return
    config = transformers.OneFormerConfig(
        conv_dim=32, mask_dim=32, query_dec_layers=1, is_training=False, **small_decoder)
    classes = {str(i): {"name": name, "isthing": int(i < 2)} for i, name in enumerate(PANOPTIC)}
    folder.mkdir()
    (folder / "classes.json").write_text(json.dumps(classes))
    images = transformers.OneFormerImageProcessorPil(
        size=side, repo_path=str(folder), class_info_file="classes.json", num_text=1)
    tokenizer = train_tokenizer(["the task is panoptic"], 300, 77)
    save(folder, transformers.OneFormerForUniversalSegmentation, config,
         transformers.OneFormerProcessor(images, tokenizer))


@pytest.mark.parametrize("family", ["mask2former", "oneformer", "eomt"])
def test_universal_segmenters_load_without_scipy_and_name_each_segment(
        tmp_path, monkeypatch, family):
    universal(family, tmp_path / family)
    missing = (lambda: False, "{0} needs scipy")
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "scipy", missing)
    finder = segmenter.Segmenter(tmp_path / family, CPU)
    assert finder.labels == ["person", "dog", "sky"] and finder.SURE == 0.8
    images = some_images(3, 40)
    finder.SURE = 1.0
    assert finder(images) == [[], [], []]
    finder.SURE = 0.3                                 # random models are rarely sure
    outputs = []
    finder.model.register_forward_hook(lambda model, given, output: outputs.append(output))
    found = finder(images)
    assert len(found) == 3 and any(found)
    for n, parts in enumerate(found):
        expected = []
        p = outputs[0].class_queries_logits[n].softmax(-1)
        logits = outputs[0].masks_queries_logits[n:n + 1]
        masks = F.interpolate(logits, (40, 40), mode="bilinear")[0].sigmoid()
        queries = [q for q in range(len(p)) if p[q].max() > 0.3 and p[q].argmax() < 3]
        for q in queries:
            rivals = torch.stack([p[r].max() * masks[r] for r in queries])
            visible = (masks[q] > 0.5) & (p[q].max() * masks[q] == rivals.max(0).values)
            if visible.sum() > 0.8 * (masks[q] > 0.5).sum() and visible.float().mean() >= 0.012:
                expected.append((finder.labels[p[q].argmax()], visible.numpy().tobytes()))
        assert [(name, mask.tobytes()) for name, mask in parts] == expected


@pytest.mark.parametrize("family", ["mask2former", "oneformer", "eomt"])
def test_on_a_gpu_universal_segmenters_and_sam_find_parts(tmp_path, pretended_gpu, family):
    universal(family, tmp_path / family)
    save_sam(tmp_path / "sam")
    finder = segmenter.Segmenter(tmp_path / family, DEVICE, tmp_path / "sam")
    finder.SURE = 0.3
    finder.sam.POINTS = 6
    finder.sam.PREDICTED_IOU = finder.sam.STABILITY = 0.0
    assert len(finder(some_images(2, 40))) == 2


# --------------------------------------------------------------------------------- two-sided score
@pytest.mark.parametrize("prompt, label, number", [
    ("two red circles above a blue square", "red circle", 2),
    ("two red circles above a blue square", "blue square", 1),
    ("a pair of dogs beside 3 cats", "dog", 2), ("a pair of dogs beside 3 cats", "cat", 3),
    ("A man on a horse", "horse", 1), ("a group of dogs on grass", "dog", None),
    ("dogs on grass", "dog", None), ("two men", "person", None), ("", "dog", None),
    ("two red circles above a blue circle", "green circle", None)])
def test_the_number_of_a_label_is_read_from_the_prompt(prompt, label, number):
    assert fine_rewards.named_count(prompt, label) == number


def test_two_sided_scores_also_ask_for_what_the_prompt_names():
    certain = {("two dogs and a cat", "dog"), ("two dogs and a cat", "cat"), ("dogs", "dog")}
    labels = ["dog", "cat", "bus"]

    def score_labels(pairs):
        return np.array([2.6 if pair in certain else 2.4 for pair in pairs])
    parts = [parts_of("dog", "dog", "cat", "bus"), parts_of("dog"), parts_of("dog"), parts_of(),
             parts_of("dog", "dog", "dog", "cat"), parts_of("dog", "dog")]
    prompts = ["two dogs and a cat"] * 2 + ["dogs", "dogs", "two dogs and a cat", "a boat"]
    recalls = fine_rewards.sam_recall(parts, prompts, labels, score_labels)
    assert np.allclose(recalls, [0.5, 0.25 - 0.5, 0.5, -0.5, (2 / 3 + 1) / 2 - 0.5, 0])


def test_the_two_sided_reward_is_the_mean_of_both_sides(world):
    cfg = small(world, weights=(0.0, 1.0, 0.0, 0.0))
    images = some_images(4)
    scores = {}
    for kind in ("one-sided", "two-sided"):
        rewards = Rewards(dataclasses.replace(cfg, sam_score=kind), load_base(world))
        rewards.label_scorer = lambda pairs: np.array([1.0 + len(p) % 2 + len(b) % 2
                                                       for p, b in pairs])
        scores[kind] = rewards(images, PROMPTS)["sam"]
    recall = fine_rewards.sam_recall(
        rewards.segmenter(images), PROMPTS, LABELS, rewards.label_scorer)
    assert np.allclose(scores["two-sided"], (scores["one-sided"] + recall) / 2) and recall.any()


# ------------------------------------------------------------------------------ sample and tune
@pytest.fixture(scope="module")
def dataset(world):
    return image_data.CaptionedImages(world / "data" / "shapes", "train", 24)


def test_each_candidate_has_noise_of_its_own_and_guidance_of_candidates(world):
    base = load_base(world)
    cfg = small(world, candidate_guidance=1.5)
    candidates = fine_rewards.sample_candidates(cfg, base, PROMPTS, 0)
    assert candidates.shape == (4, 3, 24, 24, 3) and candidates.dtype == np.uint8
    for i, k in ((0, 0), (1, 2), (3, 1)):
        alone = base.generate([PROMPTS[i]], steps=2, guidance=1.5, seed=1, first=3 * i + k)[0]
        assert np.allclose(alone, candidates[i, k], atol=1)
    assert np.mean(candidates[0, 0] != candidates[0, 1]) > 0.5
    second_round = fine_rewards.sample_candidates(cfg, base, PROMPTS, 1)
    assert np.mean(candidates != second_round) > 0.5
    next_seed = fine_rewards.sample_candidates(dataclasses.replace(cfg, seed=1), base, PROMPTS, 0)
    assert np.mean(next_seed != second_round) > 0.5


def test_no_image_gives_two_prompts_before_all_have_given_one(world, dataset):
    rounds = [fine_rewards.round_prompts(small(world, prompts=16), dataset, n) for n in range(5)]
    indices = [i for _, of_round in rounds for i in of_round]
    assert sorted(indices[:40]) == list(range(40)) and indices[40:] == indices[:40]
    for prompts, of_round in rounds:
        assert all(prompt in dataset.items[i][1] for prompt, i in zip(prompts, of_round))


def tune(cfg, base, folder):
    """Fine-tunes `base` on six images; returns them and their prompts."""
    images = torch.from_numpy(some_images(6)).permute(0, 3, 1, 2).contiguous()
    prompts = [f"image {i}" for i in range(6)]
    finetune_lora(cfg, base, images, prompts, 0, folder, NEW)
    return images, prompts


def test_only_attention_is_tuned_and_by_the_rank_of_lora(world, tmp_path):
    base = load_base(world)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    tune(small(world), base, tmp_path)
    after = base.model.state_dict()
    merged = load_file(tmp_path / "model.safetensors")
    assert set(before) == set(after) == set(merged)
    for name, tensor in after.items():
        change = tensor - before[name]
        attention = name.endswith((".qkv.weight", ".proj.weight")) and "block" in name
        assert bool(change.any()) == attention, name
        assert not attention or torch.linalg.matrix_rank(change, rtol=1e-3) == 2
        assert torch.equal(tensor, merged[name])


def test_lora_begins_as_the_model_and_learns_each_image_under_its_prompt_or_none(
        world, tmp_path, monkeypatch):
    base = load_base(world)
    text_encoder = base.text_encoder
    plain = uvit_fusion.diffusion_loss
    read = []
    seen = []

    def loss(model, *inputs):
        value = plain(model, *inputs)
        seen.append((inputs[1], value.item(), plain(base.model, *inputs).item()))
        return value
    monkeypatch.setattr(uvit_fusion, "diffusion_loss", loss)
    base.text_encoder = lambda texts: read.append(texts) or text_encoder(texts)
    cfg = small(world, steps=12, caption_dropout=0.5, lr=0.1)
    images, prompts = tune(cfg, base, tmp_path)
    assert seen[0][1] == pytest.approx(seen[0][2], rel=1e-6)                        # B = 0
    assert sum(tuned - frozen for _, tuned, frozen in seen) < 0                     # it learns
    pairs = []
    for (x_0, _, _), texts in zip(seen, read):
        for x, text in zip(x_0, texts):
            matches = [torch.equal(image_data.to_float(image), x) for image in images]
            pairs.append((matches.index(True), text))
    assert all(text in ("", prompts[i]) for i, text in pairs)
    assert 10 < sum(text == "" for _, text in pairs) < 38
    assert sorted(i for i, _ in pairs) == sorted(8 * list(range(6)))                # evenly


def test_dpo_compares_errors_with_those_of_the_reference(clip_folder):
    base = tiny_pipeline(clip_folder)
    other = tiny_pipeline(clip_folder, seed=1)
    torch.manual_seed(0)
    best, worst, eps = torch.randn(3, 3, 3, 8, 8)
    t = torch.tensor([100, 500, 900])
    text, mask = base.text_encoder(PROMPTS[:3])
    inputs = (base.diffusion, best, worst, t, eps, text, mask)
    losses = []
    for i in range(3):
        error = {}
        for name, network in (("model", other.model), ("ref", base.model)):
            for image, x_0 in (("w", best), ("l", worst)):
                row = slice(i, i + 1)
                error[name, image] = uvit_fusion.diffusion_loss(
                    network, base.diffusion, x_0[row], t[row], eps[row], text[row], mask[row])
        ahead = (error["model", "w"] - error["ref", "w"]
                 - error["model", "l"] + error["ref", "l"])
        losses.append(math.log1p(math.exp(5 * ahead)))
    loss = fine_rewards.dpo_loss(other.model, base.model, 5.0, *inputs)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    same = fine_rewards.dpo_loss(base.model, base.model, 5.0, *inputs)
    assert same.item() == pytest.approx(math.log(2))


def test_dpo_learns_the_best_against_the_worst(world, tmp_path):
    base = load_base(world)
    start = load_base(world)
    images = torch.from_numpy(some_images(6)).permute(0, 3, 1, 2).contiguous()
    best, worst = images.split(3)
    cfg = small(world, learn="dpo", steps=30, lr=0.05, beta=10.0, caption_dropout=0.0)
    finetune_lora(cfg, base, best, PROMPTS[:3], 0, tmp_path, NEW, worst)
    text, mask = base.text_encoder(PROMPTS[:3])
    changes = []
    for x in (best, worst):
        x_0 = image_data.to_float(x)
        errors = []
        for network in (base.model, start.model):
            torch.manual_seed(0)
            rows = [uvit_fusion.diffusion_loss(
                network, base.diffusion, x_0, torch.full((3,), t), torch.randn_like(x_0), text,
                mask).item() for t in (300, 600, 900)]
            errors.append(np.mean(rows))
        changes.append(errors[0] - errors[1])
    assert changes[0] < changes[1] - 1e-4


# ------------------------------------------------------------------------------------ a whole run
@pytest.fixture(scope="module")
def whole(world, rewards, dataset):
    """The folder of two uninterrupted rounds."""
    base = load_base(world)
    raft(small(world), base, rewards, dataset, world / "whole", NEW)
    images = base.generate(PROMPTS, steps=2)
    return SimpleNamespace(folder=world / "whole", images=images)


def test_a_round_learns_the_best_of_each_prompt_and_from_all_rounds_so_far(
        world, whole, rewards, dataset, tmp_path):
    cfg = small(world)
    model = load_base(world)                          # round 2 begins with that of round 1
    images = []
    prompts = []
    for n in (0, 1):
        asked, _ = fine_rewards.round_prompts(cfg, dataset, n)
        candidates = fine_rewards.sample_candidates(cfg, model, asked, n)
        kept, best = select_best(score(rewards, candidates, asked), rewards.weights, 0.6)
        chosen = torch.load(whole.folder / f"round{n + 1}" / "chosen.pt", weights_only=True)
        assert chosen["prompts"] == [asked[i] for i in kept] and len(kept) == 3
        learned = chosen["images"].permute(0, 2, 3, 1).numpy()
        assert np.allclose(learned, candidates[kept, best], atol=1)
        worst = aggregate_ranks(score(rewards, candidates, asked), rewards.weights).argmax(1)
        rejected = chosen["rejected"].permute(0, 2, 3, 1).numpy()
        assert np.allclose(rejected, candidates[kept, worst[kept]], atol=1)
        images.append(chosen["images"])
        prompts += chosen["prompts"]
        finetune_lora(cfg, model, torch.cat(images), prompts, n, tmp_path / str(n), NEW)
        tuned = load_file(whole.folder / f"round{n + 1}" / "model.safetensors")
        for name, tensor in model.model.state_dict().items():
            assert torch.allclose(tensor, tuned[name], atol=5e-4), name


def test_real_images_are_the_default_but_not_where_selections_are_compared(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    settings = []

    def load_base(cfg, args):
        settings.append(cfg)
        raise Stop
    monkeypatch.setattr(fine_rewards, "load_base", load_base)
    args = SimpleNamespace(overwrite=False)
    for name in experiments.VARIANTS:
        with pytest.raises(Stop):
            experiments.train_variant(name, fine_rewards.Config(), None, tmp_path, args)
    assert fine_rewards.Config().real == 0.5
    assert fine_rewards.Config(**fine_rewards.PRESETS["paper"]).real == 0
    assert [cfg.real for cfg in settings] == [
        0.5 if name == "rank_sum_real" else 0.0 for name in experiments.VARIANTS]


def test_real_images_are_learned_from_beside_those_chosen(
        world, whole, dataset, monkeypatch, tmp_path):
    tuned_on = []
    monkeypatch.setattr(fine_rewards, "finetune_lora", lambda *given: tuned_on.append(given[2:4]))
    cfg = small(world, real=0.7, rounds=1)
    for learn, count in (("sft", 5), ("dpo", 3)):     # 0.7 x 3 besides 3
        shutil.copytree(whole.folder / "round1", tmp_path / learn / "round1")
        cfg = dataclasses.replace(cfg, learn=learn)
        common.write_json(tmp_path / learn / "round1" / "config.json", dataclasses.asdict(cfg))
        raft(cfg, load_base(world), None, dataset, tmp_path / learn, RESUME)
        images, prompts = tuned_on[-1]
        assert len(images) == len(prompts) == count
    images, prompts = tuned_on[0]
    asked, indices = fine_rewards.round_prompts(cfg, dataset, 0)
    for i, prompt, image, own in zip(indices, prompts[3:], images[3:], asked):
        assert torch.equal(image, dataset.image(i)) and prompt == own


def test_a_run_and_each_of_its_rounds_generate_as_what_was_tuned(whole):
    for folder, same in ((whole.folder, True), (whole.folder / "round2", True),
                         (whole.folder / "round1", False)):
        images = sample.load_run(folder, "cpu", "fp32").generate(PROMPTS, steps=2)
        assert np.allclose(images, whole.images, atol=2) == same
    width, height = Image.open(whole.folder / "samples" / "round2.png").size
    assert width > 3 * 96 and height > 4 * 96         # K columns, a row for each of four prompts


@pytest.mark.parametrize("owner, name, number", [
    (uvit_fusion.Pipeline, "generate", 1), (uvit_fusion.Pipeline, "generate", 2),
    (Rewards, "score_batch", 2), (uvit_fusion, "diffusion_loss", 1),
    (uvit_fusion, "diffusion_loss", 4)])
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
        world, whole, rewards, dataset, tmp_path, monkeypatch, owner, name, number):
    plain = getattr(owner, name)
    calls = []

    def interrupted(*given, **more):                  # by Ctrl-C, in call `number`
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return plain(*given, **more)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            raft(small(world), load_base(world), rewards, dataset, tmp_path, NEW)
    raft(small(world), load_base(world), rewards, dataset, tmp_path, RESUME)
    expected = load_file(whole.folder / "model.safetensors")
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.allclose(tensor, expected[key], atol=5e-4), key


def test_a_finished_run_samples_and_learns_no_more(world, whole, dataset, tmp_path, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / "run")
    monkeypatch.setattr(fine_rewards, "sample_candidates", None)
    monkeypatch.setattr(uvit_fusion, "diffusion_loss", None)
    base = load_base(world)
    raft(small(world), base, None, dataset, tmp_path / "run", RESUME)
    assert np.allclose(base.generate(PROMPTS, steps=2), whole.images, atol=2)
    with pytest.raises(UserError, match="lr = 0.01, now it is 0.1"):
        raft(small(world, lr=0.1), load_base(world), None, dataset, tmp_path / "run", RESUME)


def test_starting_over_leaves_no_old_model(world, whole, dataset, tmp_path, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / "run")
    monkeypatch.setattr(fine_rewards, "sample_candidates", None)         # stops it at once
    with pytest.raises(TypeError):
        raft(small(world), load_base(world), None, dataset, tmp_path / "run", NEW)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("damage", [
    lambda chosen: chosen.pop("prompts"), lambda chosen: chosen["prompts"].pop(),
    lambda chosen: chosen["prompts"].__setitem__(0, 5), lambda chosen: chosen.update(rejected=[]),
    lambda chosen: chosen.update(images=chosen["images"][:, :1]), bytes])
def test_images_chosen_before_are_read_if_they_are_whole_and_of_these_settings(
        world, whole, tmp_path, damage):
    cfg = small(world)
    folder = shutil.copytree(whole.folder / "round1", tmp_path / "round1")
    images, rejected, prompts = fine_rewards.load_chosen(cfg, folder)
    assert len(images) == len(rejected) == len(prompts) == 3
    for name in ("state.pt", "model.safetensors"):    # killed before the first checkpoint
        (folder / name).unlink()
    common.check_run(tmp_path, RESUME)
    for name, value in {"seed": 5, "candidates": 4, "keep": 0.5}.items():
        with pytest.raises(UserError, match=f"was started with {name} = "):
            fine_rewards.load_chosen(small(world, **{name: value}), folder)
    if damage is bytes:                               # cut off
        (folder / "chosen.pt").write_bytes((folder / "chosen.pt").read_bytes()[:1000])
    else:
        chosen = torch.load(folder / "chosen.pt", weights_only=True)
        damage(chosen)
        torch.save(chosen, folder / "chosen.pt")
    with pytest.raises(UserError, match="chosen.pt: .*: delete it, then"):
        fine_rewards.load_chosen(cfg, folder)


# ------------------------------------------------------------------------------------ commands
FLAGS = ["--weights", 1, 1, 1, 0, "--candidates", 2, "--prompts", 4, "--sample-steps", 1,
         "--steps", 2, "--batch-size", 2, "--rank", 2, "--samples", 6, "--device", "cpu",
         "--precision", "fp32", "--scorer", "scorer.safetensors"]


def command(world, *flags, script="fine_rewards.py", out="new"):
    experts = [[f"--{name}", world / name] for name in ("base", "captioner", "segmenter", "llm")]
    return run(script, *sum(experts, []), *FLAGS, "--out", out, *flags, cwd=world)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_training_ends_with_what_was_gained(world):
    status, out, errors = command(world, "--train", "--guidance", 2, out="graded")
    assert status == 0 and "mean reward" in out, errors
    figures = results(world / "graded")
    expected = {"distance_start", "distance_final", "seconds", "peak_memory_mb", "commit",
                "machine", "command"}
    for name in ("start", "final", "gain", "start_own", "variety_lost_percent"):
        expected |= {name, f"{name}_ci"}
    for name in ("diversity", "clip_diversity"):
        expected |= {f"{name}_start", f"{name}_final", f"{name}_real"}
    assert set(figures) == expected and (world / "graded" / "rewards.png").exists()
    assert figures["gain"] == pytest.approx(figures["final"] - figures["start"], abs=0.01)
    lost = 1 - figures["diversity_final"] / figures["diversity_start"]
    assert figures["variety_lost_percent"] == pytest.approx(100 * lost, abs=0.01)
    assert sample.load_run(world / "graded", "cpu", "fp32").cfg.guidance == 2
    refused(command(world, "--train", out="graded"), "graded/ already holds a run", "--resume")


def test_on_a_gpu_a_training_works(world, pretended_gpu):
    status, _, errors = command(world, "--train", "--sam-score", "two-sided", "--learn", "dpo",
                                "--weights", 1, 1, 1, 1, "--rounds", 1, out="on_gpu")
    assert status == 0, errors


def test_photographs_and_latents_are_learned_from_but_not_judged(world, clip_folder, tmp_path):
    make_coco(tmp_path / "coco")
    torch.manual_seed(0)
    torch.save(Autoencoder((32, 32), blocks=1).state_dict(), tmp_path / "vae.pth")
    vae = dict(autoencoder=str(tmp_path / "vae.pth"), channels=4, clip_x0=False, size=16)
    save_run(tiny_pipeline(clip_folder, **vae), tmp_path / "latents")
    flags = ["--base", tmp_path / "latents", "--data", tmp_path / "coco", "--rounds", 1]
    status, _, errors = command(world, "--train", *flags, out="photographs")
    assert status == 0 and (world / "photographs" / "samples" / "validation.png").exists(), errors
    assert not (world / "photographs" / "rewards.png").exists()
    assert {"seconds", "peak_memory_mb", "command"} <= set(results(world / "photographs"))
    tuned = sample.load_run(world / "photographs", "cpu", "fp32")
    assert tuned.generate(["a man"], steps=1).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("flags, words", [
    (["--captioner", "segmenter"], ["--captioner segmenter", "captioner"]),
    (["--segmenter", "llm"], ["--segmenter llm"]), (["--llm", "./nowhere"], ["no such folder"]),
    (["--scorer", "none.safetensors", "--weights", 0, 0, 0, 1], ["--scorer none.safetensors"]),
    (["--weights", 0, 0, 0, 0], ["--weights", "above 0"]), (["--resume"], ["--resume"]),
    (["--seed", 10**8 + 1], ["--seed", "100000000"]),
    (["--instruction", "in {prompt}?"], ["{label}"]), (["--base", "nowhere"], ["train it first"])])
def test_slips_end_in_one_line_and_leave_no_folder(world, flags, words):
    refused(command(world, "--train", *flags), *words)
    assert not (world / "new").exists()


# --------------------------------------------------------------------------------- experiments
def test_diversity_is_the_mean_distance_between_images_of_a_caption(rewards):
    images = some_images(6)
    features = rewards.clip.images(images).view(2, 3, -1)
    pixels = images.reshape(2, 3, -1) / 255
    rms = []
    cosine = []
    for c, i, j in [(c, i, j) for c in range(2) for i, j in ((0, 1), (0, 2), (1, 2))]:
        rms.append(np.square(pixels[c, i] - pixels[c, j]).mean()**0.5)
        cosine.append(1 - F.cosine_similarity(features[c, i], features[c, j], dim=0).item())
    found = gain.diversity(images, rewards.clip, each=3)
    assert found["diversity"] == pytest.approx(np.reshape(rms, (2, 3)).mean(1), rel=1e-3)
    assert found["clip_diversity"] == pytest.approx(np.reshape(cosine, (2, 3)).mean(1), rel=1e-3)
    for values in gain.diversity(images[[0, 0, 1, 1]], rewards.clip, each=2).values():
        assert values.max() < 1e-5


def test_variety_lost_is_a_share_of_what_there_was():
    start = {"diversity": np.array([0.2, 0.3])}
    lost = gain.variety_lost(start, {"diversity": np.array([0.19, 0.26])})
    assert lost["variety_lost_percent"] == pytest.approx(10)           # 0.05 of 0.5
    assert lost["variety_lost_percent_ci"] == pytest.approx(1.96 * 6 / 2**0.5)


def test_the_sum_of_rewards_weighs_standardised_rewards(monkeypatch, rewards):
    values = {"caption": np.array([1.0, 3.0]), "clip": np.array([500.0, 100.0]),
              "sam": np.array([7.0, 7.0])}            # equal for all, it decides nothing
    monkeypatch.setattr(Rewards, "__call__", lambda *given: values)
    monkeypatch.setattr(rewards, "weights", {"caption": 1.0, "clip": 0.5, "sam": 2.0})
    summed = experiments.SumOfRewards(rewards)(None, None)
    assert summed["sum"] == pytest.approx([-0.5, 0.5])


def test_each_reward_chooses_and_the_judge_says_whether_it_is_right(world, monkeypatch):
    def read(self, images, prompts):                  # the redder, the better, except for one
        red = images[..., 0].mean((1, 2)).astype(float)
        return {name: -red if name == "clip" else red for name in self.weights}
    monkeypatch.setattr(Rewards, "__call__", read)
    thing = shapes.Thing("red", "circle", 0.5, 0.5, 0.1)
    monkeypatch.setattr(judge, "judge", lambda things, scene: {"all": len(things) == 2})

    def parse(images):
        most = images[..., 0].mean((1, 2)).argmax()
        return [[thing, thing] if i == most else [] for i in range(len(images))]
    monkeypatch.setattr(judge, "parse", parse)
    flags = ["choose", "--samples", 3, "--candidates", 4]
    status, out, errors = command(world, *flags, script="experiments.fine_rewards", out="chosen")
    assert status == 0 and "things" in out, errors
    figures = results(world / "chosen")
    for name in experiments.CHOICES:
        assert {f"{name}_ci", f"{name}_things"} <= set(figures)
    found = [figures[name] for name in ("random", "oracle", "caption", "caption_sam", "clip")]
    assert found == [25, 100, 100, 100, 0]
    assert [figures["sam_things"], figures["sam_kinds"], figures["clip_kinds"]] == [2, 1, 0]


def test_all_ways_to_learn_are_compared_and_what_is_finished_is_kept(world, monkeypatch):
    flags = ["compare", "--rounds", 1, "--steps", 1, "--prompts", 2]
    script = "experiments.fine_rewards"
    status, out, errors = command(world, *flags, script=script, out="compared")
    assert status == 0, errors
    figures = results(world / "compared")
    for name in ("start", *experiments.VARIANTS):
        for key in (name, f"{name}_gain", f"{name}_variety_lost_percent", f"ahead_of_{name}"):
            assert {key, f"{key}_ci"} <= set(figures)
    monkeypatch.setattr(uvit_fusion, "diffusion_loss", None)
    monkeypatch.setattr(fine_rewards, "dpo_loss", None)
    monkeypatch.setattr(fine_rewards, "sample_candidates", None)
    status, again, errors = command(world, *flags, script=script, out="compared")
    assert status == 0 and again.split("all right, %")[-1] == out.split("all right, %")[-1], errors


def test_over_seeds_the_interval_of_variety_lost_is_students(world, monkeypatch):
    lost = iter([0.0, 8.0, 12.0])                     # of the start, then of two seeds
    monkeypatch.setattr(gain, "variety_lost", lambda *given: {
        "variety_lost_percent": next(lost), "variety_lost_percent_ci": 0.0})
    flags = ["compare", "--rounds", 1, "--steps", 1, "--prompts", 2, "--seeds", 2,
             "--variants", "rank_sum"]
    status, _, errors = command(world, *flags, script="experiments.fine_rewards", out="seeds")
    assert status == 0, errors
    figures = results(world / "seeds")
    assert figures["rank_sum_variety_lost_percent"] == 10
    assert figures["rank_sum_variety_lost_percent_ci"] == pytest.approx(12.706 * 2, rel=1e-3)
    assert (world / "seeds" / "rank_sum_seed1" / "model.safetensors").exists()


def test_a_reward_that_always_prefers_the_right_caption_is_said_to(world, monkeypatch):
    _, captions, _ = judge.validation_scenes(world / "data" / "shapes", 6)

    def read(self, images, prompts):
        right = np.array([float(prompt in captions) for prompt in prompts])
        return {"caption": right, "sam": 0 * right, "clip": -right}
    monkeypatch.setattr(Rewards, "__call__", read)
    flags = ["analyse", "--weights", 1, 1, 0.5, 0]
    status, _, errors = command(world, *flags, script="experiments.fine_rewards", out="analysed")
    assert status == 0, errors
    figures = results(world / "analysed")
    for field in ("count", "colour", "shape", "relation"):
        found = [figures[f"{field}_{name}"] for name in ("caption", "sam", "clip", "all")]
        assert found == [100, 50, 0, 100]
