r"""Fine-grained semantic rewards, and fine-tuning on what they rank first (arXiv 2305.19599).

The idea. Generate several candidates for a prompt, score them, and fine-tune on the best. Two
rewards look at meaning. For one, a captioner describes the whole image, and the caption is compared
with the prompt. For the other, a segmenter names the parts of the image, and a language model says
how likely each of them is in the scene. Rewards have no common unit, so they vote by rank.

    caption reward    R(x, p) = cos(CLIP(captioner(x)), CLIP(p))           both by CLIP's text model
    SAM reward        R(x, p) = (sum_i s_i - 2 n) / (2 n)                  n parts; -0.5 if n = 0
                      where part i, with the label l_i, has the expected score
                      s_i = sum_v v P_LLM(v | p, l_i), v = 1 (unlikely), 2 (possible), 3 (certain)
    CLIP reward       R(x, p) = cos(CLIP(x), CLIP(p))
    aesthetic reward  R(x) = w CLIP(x) + b

    rank_r(k)  = 0 for the best of the K candidates under reward r, ..., K - 1 for the worst
    best       = argmin_k sum_r weight_r rank_r(k)                         one image a prompt
    loss       = |model(x_t, t, p) - target|^2 of the best images, with LoRA on all attention,
                 and of half as many real ones;
                 with --learn dpo also of the worst, see `dpo_loss`

A round samples from the current model, scores, selects, and fine-tunes on everything selected so
far. The next round starts from the result (RAFT: reward-ranked fine-tuning, arXiv 2304.06767).

Shapes: P prompts, K candidates of each: candidates (P, K, H, W, 3) uint8, scores {reward: (P, K)}.

    python fine_rewards.py --train          # 12 to 29 min on two cores: from 59 to 74 % right
    python sample.py "two red circles above a blue square" --run runs/fine_rewards
    python fine_rewards.py --train --preset paper --base runs/coco256 --data coco
    python -m experiments.fine_rewards choose --samples 300     # or compare, analyse: the rewards

Differs from the paper [what its release does]; docs/fine_rewards.md has the rest:
 1. All K candidates are scored against their own prompt [candidate i against the i-th prompt].
 2. Ranks count better candidates, and equal rewards share a rank [argsort in place of ranks].
 3. A label's score is an expectation, in a fresh context [digits from one long conversation].
 4. A segmenter finds the parts, or with --sam SAM does: segmenter.py [tags of a tagger, no SAM].
 5. toy: three rewards vote, with weights 1, 0.5, 1; the model learns from the best 80 % of the
    selected images and half as many real ones, which keep variety [caption and SAM reward, the
    former by a CLIP tuned to human taste; all of the selected images, and no others].
 6. Two optional additions: --sam-score two-sided also sees what is missing; --learn dpo.
"""
import argparse
import collections
import copy
import dataclasses
import os
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import encoders
import image_data
import toy
import uvit_fusion
from common import UserError
from segmenter import Segmenter
from toy import gain, judge, validation
from uvit_fusion import load_pipeline  # sample.py calls it for runs of this method, too

REWARDS = ("caption", "sam", "clip", "aesthetic")


@dataclass
class Config:
    # the experts
    base: str = "runs/uvit_fusion/step1400.safetensors"  # run of uvit_fusion.py to tune, or weights
    captioner: str = "runs/toy/captioner"  # image captioner: a folder, or a name on the hub
    segmenter: str = "runs/toy/segmenter"  # semantic or universal: names the parts
    sam: str = ""  # Segment Anything model that finds the parts (default: the segmenter finds them)
    llm: str = "runs/toy/llm"  # causal language model that scores the labels
    clip_model: str = ""  # CLIP of the rewards (default: the base's)
    scorer: str = "runs/toy/quality.safetensors"  # linear head on CLIP, for the aesthetic reward
    instruction: str = "scene: {prompt}. {label}:"  # the question the LLM answers with 1, 2 or 3
    # sample, score and select
    prompts: int = 2000  # prompts a round
    candidates: int = 10  # K, images sampled for a prompt
    sample_steps: int = 10  # network evaluations a candidate
    candidate_guidance: float = 1.5  # guidance that candidates are sampled with
    weights: tuple = (1.0, 0.5, 1.0, 0.0)  # of the ranks by caption, SAM, CLIP, aesthetic reward
    sam_score: Literal["one-sided", "two-sided"] = "one-sided"  # two-sided: also what is missing
    score_batch: int = 256  # images scored at a time
    keep: float = 0.8  # share of the prompts to learn from, those with the best images
    # tune
    learn: Literal["sft", "dpo"] = "sft"  # from the best image, or from the best against the worst
    beta: float = 500.0  # of dpo: beta T; larger stays closer to the start of the round
    real: float = 0.5  # of sft: real images to learn from, for each chosen one; they keep variety
    rounds: int = 2  # rounds of sampling, scoring, selecting and tuning
    steps: int = 400  # training steps a round
    batch_size: int = 64  # images per step
    rank: int = 32  # of LoRA
    lr: float = 2e-3  # highest learning rate of AdamW
    warmup: int = 20  # steps of linear warm-up
    decay: float = 1.0  # share of the steps, at the end, in which the rate falls to 0 (cosine)
    weight_decay: float = 0.01  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    guidance: float = 1.0  # w of the tuned model (1: none, since it learns from guided images)
    data: str = "shapes"  # shapes (the toy world), or a folder: MS-COCO, or .txt beside images
    seed: int = 0  # of prompts, noise and order
    # no flags: a hash of the base's weights, so that --resume refuses another base; and what
    # tells sample.py how to load a run
    base_identity: str = ""
    method: str = "fine_rewards"

    def __post_init__(self):
        if not any(self.weights):
            raise UserError(f"--weights: one of {', '.join(REWARDS)} must be above 0")
        common.check_bounds(
            self, prompts=(1, 10**7), candidates=(2, 10**4), sample_steps=(1, 1000),
            score_batch=(1, 2**20), keep=(0, 1), beta=(1e-9, 1e9), real=(0, 1),
            rounds=(1, 1000), rank=(1, 10**6))
        if "{prompt}" not in self.instruction or "{label}" not in self.instruction:
            raise UserError("--instruction must contain {prompt} and {label}")


PRESETS = {
    "toy": {},
    "paper": dict(
        base="runs/coco256", captioner="Salesforce/blip2-opt-2.7b",
        segmenter="facebook/mask2former-swin-tiny-coco-panoptic", sam="facebook/sam-vit-base",
        llm="Qwen/Qwen2.5-7B-Instruct",  # the paper: lmsys/vicuna-7b-v1.5 (needs sentencepiece)
        instruction=(
            "A picture was made for the description: {prompt}\n"
            "One part of the picture has been recognised as: {label}\n"
            "How likely is it that a {label} appears in the scene that is described? "
            "Answer 3 if it is certain, 2 if it is possible, 1 if it is unlikely.\nAnswer:"),
        clip_model="openai/clip-vit-large-patch14",
        weights=(1.0, 1.0, 0.0, 0.0), score_batch=16, keep=1.0, real=0.0, prompts=5000,
        sample_steps=50, candidate_guidance=2.0, guidance=2.0,
        steps=6250,  # ten passes of batch 8 over the images that a round adds
        batch_size=8, rank=4, lr=9e-6, warmup=0, decay=0.0, data="coco"),
}
# --quick: a smaller run
QUICK = dict(out="runs/quick_fine_rewards", samples=128, prompts=100, rounds=1, steps=60)


# -------------------------------------------- the experts: captioner, segmenter, language model
class Captioner:
    """Images uint8 (N, H, W, 3) -> N captions, with any image-to-text model of transformers."""
    def __init__(self, path, device, dtype):
        self.model, self.processor = encoders.load_pretrained(
            "AutoModelForImageTextToText", path, "--captioner", "captioner", device,
            "AutoProcessor", dtype=dtype)

    @torch.no_grad()
    def __call__(self, images):
        inputs = self.processor(images=list(images), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=30, do_sample=False)
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


class LabelScorer:
    """How likely a label is in the scene of a prompt: N pairs (prompt, label) -> (N,), 1 to 3.

    A causal LLM reads each pair by itself. Nothing is generated: the score is the expectation
    sum_v v P(v) under the probabilities of "1", "2" and "3" as the next token.
    """
    def __init__(self, path, instruction, device, dtype):
        self.model, self.tokenizer = encoders.load_pretrained(
            "AutoModelForCausalLM", path, "--llm", "language model", device, dtype=dtype)
        self.instruction = instruction

    def tokenize(self, prompt, label):
        """Token ids of the question, and of the three answers to it."""
        # no str.format: an instruction may contain other braces
        text = self.instruction.replace("{label}", label).replace("{prompt}", prompt)
        chat = self.tokenizer.chat_template is not None
        if chat:                                     # it has all the special tokens needed
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        else:
            text += " "
        answers = [f"{text}{v}" for v in (1, 2, 3)]
        rows = self.tokenizer(answers, add_special_tokens=not chat).input_ids
        question = os.path.commonprefix(rows)        # with the space, if it is a token of its own
        return question, [row[len(question)] for row in rows]

    def __call__(self, pairs):
        unique = sorted(set(pairs))                  # the candidates of a prompt share most labels
        scores = {}
        for start in range(0, len(unique), 64):      # the logits of a large vocabulary take memory
            batch = unique[start:start + 64]
            scores.update(zip(batch, self.expected_scores(batch)))
        return np.array([scores[pair] for pair in pairs])

    @torch.no_grad()
    def expected_scores(self, pairs):
        questions, digits = zip(*[self.tokenize(prompt, label) for prompt, label in pairs])
        last = torch.tensor([len(question) - 1 for question in questions])           # (N,)
        tokens = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(question) for question in questions], batch_first=True)    # (N, L)
        mask = (torch.arange(tokens.shape[1]) <= last[:, None]).long()               # (N, L)
        device = self.model.device
        logits = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        logits = logits[torch.arange(len(pairs)), last].float().cpu()               # (N, V)
        p = logits.gather(1, torch.tensor(digits)).softmax(1)                        # (N, 3)
        return (p @ torch.tensor([1.0, 2.0, 3.0])).tolist()                          # (N,)


# ------------------------------------------------------------------------------------- rewards
def caption_reward(captions, prompts, clip):
    """cos(CLIP(caption), CLIP(p)), for a captioner's captions of N images: (N,)."""
    return (clip.texts(captions) * clip.texts(prompts)).sum(-1).cpu().numpy()


def sam_reward(parts, prompts, label_scorer):
    """(sum_i s_i - 2 n) / (2 n), in [-0.5, 0.5], of the n parts of each image: (N,).

    parts: N lists of (label, mask). It cannot see what is missing in an image, or a wrong count.
    """
    pairs = [(prompt, label) for prompt, found in zip(prompts, parts) for label, _ in found]
    ends = np.cumsum([len(found) for found in parts])
    rewards = []
    for s in np.split(label_scorer(pairs), ends[:-1]):                            # (n,)
        n = len(s)
        rewards.append((s.sum() - 2 * n) / (2 * n) if n else -0.5)
    return np.array(rewards)


# group i has the words for the number i; "a" is no number in "a group of dogs"
NUMBERS = re.compile(r"\b(an?(?! \w+ of\b)|one|1)\b|\b(an? (?:pair|couple) of|two|2)\b|"
                     r"\b(three|3)\b|\b(four|4)\b|\b(five|5)\b|\b(six|6)\b", re.IGNORECASE)


def singular(text):
    """The set of a text's words without a final s; enough for plurals such as dogs."""
    return {word.rstrip("s") for word in re.findall(r"\w+", text.lower())}


def named_count(prompt, label):
    """The number that a prompt gives for a label: the one before the words most like it.

    None where it gives none ("dogs"), or two that fit equally well.
    """
    numbers = list(NUMBERS.finditer(prompt))
    ends = [number.start() for number in numbers[1:]] + [len(prompt)]
    fits = collections.defaultdict(set)              # words in common -> numbers before them
    for number, end in zip(numbers, ends):
        shared = singular(label) & singular(prompt[number.end():end])
        fits[len(shared)].add(number.lastindex)      # the number of the group that matched
    most = max(fits, default=0)
    return fits[most].pop() if most and len(fits[most]) == 1 else None


def sam_recall(parts, prompts, labels, label_scorer):
    """How much of what a prompt names is among the parts, in [-0.5, 0.5]: (N,).

    parts: N lists of (label, mask); labels: all that the segmenter knows; a prompt names those
    with a score above 2.5. The reward is the mean over these of min(n, c) / max(n, c), minus 0.5:
    n parts are there and the prompt says c; if it says no number, one is enough.
    """
    pairs = [(prompt, label) for prompt in dict.fromkeys(prompts) for label in labels]
    named = collections.defaultdict(list)            # prompt -> labels
    for (prompt, label), score in zip(pairs, label_scorer(pairs)):
        if score > 2.5:
            named[prompt].append(label)
    recalls = []
    for prompt, found in zip(prompts, parts):
        present = collections.Counter(label for label, _ in found)
        shares = []
        for label in named[prompt]:
            n = present[label]
            c = named_count(prompt, label) or max(1, n)
            shares.append(min(n, c) / max(n, c))
        recalls.append(np.mean(shares) - 0.5 if shares else 0.0)
    return np.array(recalls)


def clip_reward(images, prompts, clip):
    """cos(CLIP(x), CLIP(p)): (N,)."""
    return (clip.images(images) * clip.texts(prompts)).sum(-1).cpu().numpy()


class Rewards:
    """The rewards that have a weight: images uint8 (N, H, W, 3), N prompts -> {reward: (N,)}."""
    def __init__(self, cfg, pipeline):
        device = pipeline.device
        # of the experts' weights: on a GPU they are large models
        dtype = pipeline.precision if device.type == "cuda" else torch.float32
        self.weights = {name: weight for name, weight in zip(REWARDS, cfg.weights) if weight}
        self.cfg = cfg
        self.clip = encoders.ClipScorer(cfg.clip_model or pipeline.cfg.clip, device)
        if "caption" in self.weights:
            self.captioner = Captioner(cfg.captioner, device, dtype)
        if "sam" in self.weights:
            self.segmenter = Segmenter(cfg.segmenter, device, cfg.sam, dtype)
            self.label_scorer = LabelScorer(cfg.llm, cfg.instruction, device, dtype)
        if "aesthetic" in self.weights:
            self.aesthetic = encoders.AestheticScorer(cfg.scorer, self.clip)

    def score_batch(self, images, prompts):
        scores = {}
        if "caption" in self.weights:
            scores["caption"] = caption_reward(self.captioner(images), prompts, self.clip)
        if "sam" in self.weights:
            parts = self.segmenter(images)
            scores["sam"] = sam_reward(parts, prompts, self.label_scorer)
            if self.cfg.sam_score == "two-sided":
                recall = sam_recall(parts, prompts, self.segmenter.labels, self.label_scorer)
                scores["sam"] = (scores["sam"] + recall) / 2
        if "clip" in self.weights:
            scores["clip"] = clip_reward(images, prompts, self.clip)
        if "aesthetic" in self.weights:
            scores["aesthetic"] = self.aesthetic(images).cpu().numpy()
        return scores

    def __call__(self, images, prompts):
        batches = []
        size = self.cfg.score_batch
        for start in tqdm(range(0, len(images), size), "scoring", leave=False):
            batch = slice(start, start + size)
            batches.append(self.score_batch(images[batch], prompts[batch]))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in self.weights}


# ----------------------------------------------------------------------- sample, score, select
def round_prompts(cfg, dataset, n):
    """The prompts of round n, from 0: captions of the data set, and the indices of their images.

    Each image gives one prompt before any gives a second.
    """
    # the same order in all rounds: each continues where the last one ended
    order = np.random.default_rng(cfg.seed).permutation(len(dataset))
    positions = np.arange(n * cfg.prompts, (n + 1) * cfg.prompts)
    indices = order[positions % len(order)].tolist()
    prompts = [random.Random(f"{cfg.seed} {n} {i}").choice(dataset.items[i][1]) for i in indices]
    return prompts, indices


def sample_candidates(cfg, pipeline, prompts, n):
    """K candidates for each of P prompts, each from its own noise: (P, K, H, W, 3) uint8."""
    repeated = [prompt for prompt in prompts for _ in range(cfg.candidates)]
    # seed 0 is that of the images which are graded
    images = pipeline.generate(repeated, steps=cfg.sample_steps, guidance=cfg.candidate_guidance,
                               seed=100 * cfg.seed + n + 1, progress=True)
    return images.reshape(len(prompts), cfg.candidates, *images.shape[1:])


def score(rewards, candidates, prompts):
    """Each candidate against its own prompt: (P, K, H, W, 3), P prompts -> {reward: (P, K)}."""
    p, k = candidates.shape[:2]
    repeated = [prompt for prompt in prompts for _ in range(k)]
    scores = rewards(candidates.reshape(p * k, *candidates.shape[2:]), repeated)
    return {name: values.reshape(p, k) for name, values in scores.items()}


def ranks(rewards):
    """Rewards (..., K) -> ranks (..., K): 0 for the highest; ties share their mean rank."""
    own = rewards[..., :, None]
    others = rewards[..., None, :]
    higher = (others > own).sum(-1)                  # (..., K, K) -> (..., K)
    equal = (others == own).sum(-1)                  # including itself
    return higher + (equal - 1) / 2


def aggregate_ranks(scores, weights):
    """sum_r weight_r rank_r(k): {reward: (..., K)} -> (..., K), the smallest is the best."""
    return sum(weights[name] * ranks(values) for name, values in scores.items())


def n_keep(keep, count):
    """How many of `count` prompts are kept to learn from."""
    return max(1, round(keep * count))


def select_best(scores, weights, keep):
    """{reward: (P, K)} -> the prompts to learn from (M,), and the best candidate of each (M,)."""
    best = aggregate_ranks(scores, weights).argmin(1)                 # (P,); of equals the first
    # of the P best candidates, keep those that rank best among themselves
    rows = np.arange(len(best))
    best_scores = {name: values[rows, best] for name, values in scores.items()}
    order = aggregate_ranks(best_scores, weights).argsort(kind="stable")
    count = n_keep(keep, len(best))
    kept = np.sort(order[:count])
    return kept, best[kept]


# ---------------------------------------------------------------------------------------- tune
def denoising_errors(model, diffusion, x_0, t, eps, text, mask):
    """|model(x_t, t, p) - target|^2, the mean of each image: (B,)."""
    prediction = model(diffusion.q_sample(x_0, t, eps), t, text, mask)
    return (prediction.float() - diffusion.target_of(x_0, t, eps)).square().mean((1, 2, 3))


def dpo_loss(model, reference, beta, diffusion, best, worst, t, eps, text, mask):
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): a scalar.

        -log sigmoid(-beta T (err_w - err_w_ref - (err_l - err_l_ref)))

    w, l: the best and the worst image, (B, C, S, S) each, with the same t and eps; err: the model's
    denoising error; err_ref: the reference's. The argument beta is the product beta T.
    """
    inputs = [torch.cat([best, worst])] + [torch.cat([x, x]) for x in (t, eps, text, mask)]
    err_w, err_l = denoising_errors(model, diffusion, *inputs).chunk(2)
    with torch.no_grad():
        err_w_ref, err_l_ref = denoising_errors(reference, diffusion, *inputs).chunk(2)
    return -F.logsigmoid(-beta * (err_w - err_w_ref - (err_l - err_l_ref))).mean()


def finetune_lora(cfg, pipeline, images, prompts, n, folder, args, rejected=None):
    """Fine-tunes pipeline.model in round n, in place: LoRA on its attention, merged at the end.

    images, and for dpo rejected: uint8 (N, 3, H, W), one for each of N prompts; folder: of the
    round; args: of `main`, for its resume and overwrite.
    """
    seed = 100 * cfg.seed + n                        # each round draws anew
    torch.manual_seed(seed)
    # a copy: for dpo, pipeline.model is the reference
    tuned = common.add_lora(copy.deepcopy(pipeline.model), cfg.rank)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, cfg.lr, weight_decay=cfg.weight_decay)
    # until LoRA is merged at the end, model.safetensors holds the model that the round began with
    run = common.Run(folder, cfg, [tuned, optimizer], pipeline.model.state_dict(), args,
                     pipeline.precision, save_every=100, title=f"round {n + 1}")
    batches = image_data.ResumableBatchSampler(
        len(prompts), cfg.batch_size, run.start, cfg.steps, seed)

    for step, batch in enumerate(batches, run.start + 1):
        # noise depends on round and step alone: a resumed run equals an uninterrupted one
        torch.manual_seed(seed * 10**7 + step)
        optimizer.param_groups[0]["lr"] = cfg.lr * uvit_fusion.learning_rate(cfg, step)
        chosen = [i for i, _ in batch]                                           # (index, seed)
        captions = [prompts[i] for i in chosen]
        x_0 = pipeline.encode(images[chosen])                                    # (B, C, S, S)
        text, mask = pipeline.text_encoder(
            uvit_fusion.drop_captions(captions, cfg.caption_dropout))
        t = pipeline.diffusion.sample_timesteps(
            len(x_0), pipeline.cfg.time_power, pipeline.device)                  # as for the base
        eps = torch.randn_like(x_0)
        if cfg.learn == "dpo":
            worst = pipeline.encode(rejected[chosen])        # encoded in fp32, like x_0
        with common.autocast(pipeline.device, pipeline.precision):
            if cfg.learn == "dpo":
                loss = dpo_loss(tuned, pipeline.model, cfg.beta, pipeline.diffusion,
                                x_0, worst, t, eps, text, mask)
            else:
                loss = uvit_fusion.diffusion_loss(
                    tuned, pipeline.diffusion, x_0, t, eps, text, mask)
        optimizer.zero_grad()
        loss.backward()
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()
        run.log(step, loss=loss)
        if run.due(step):
            run.save(step)
    pipeline.model.load_state_dict(common.merge_lora(tuned).state_dict())
    save_model(cfg, pipeline, folder)


def save_model(cfg, pipeline, folder):
    """Writes a run folder that `load_pipeline` can read."""
    common.write_json(folder / "config.json", dataclasses.asdict(cfg))
    common.write_json(folder / "uvit.json", dataclasses.asdict(pipeline.cfg))
    common.save_tensors(pipeline.model.state_dict(), folder / "model.safetensors")


def save_chosen(cfg, folder, images, rejected, prompts):
    """Keeps what a round learns from, for a resumed run: images uint8 (M, H, W, 3), M prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "config.json", dataclasses.asdict(cfg))
    chosen = {
        "images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),     # (M, 3, H, W)
        "rejected": torch.from_numpy(rejected).permute(0, 3, 1, 2).contiguous(),
        "prompts": prompts,
    }
    with common.atomic_write(folder / "chosen.pt") as unfinished:
        torch.save(chosen, unfinished)


def load_chosen(cfg, folder):
    """What `save_chosen` kept, if it was chosen with these settings: images uint8 (M, 3, H, W)."""
    common.check_settings(folder, cfg)
    path = folder / "chosen.pt"
    with common.reading(path, "delete it, then its images are chosen again"):
        chosen = torch.load(path, weights_only=True)
        images = chosen["images"]
        rejected = chosen["rejected"]
        prompts = chosen["prompts"]
        side = images.shape[-1]
        if not images.shape == rejected.shape == (len(prompts), 3, side, side):
            raise ValueError("images and prompts do not match")
        " ".join(prompts)                            # raises if one is not a string
        return images.byte(), rejected.byte(), prompts


def raft(cfg, pipeline, rewards, dataset, folder, args):
    """Rounds of sample, score, select, tune. pipeline.model is tuned in place.

    folder/round1/, round2/, ... are the run folders of the rounds, each with the images that it
    adds in chosen.pt. With args.resume, finished parts are kept.
    """
    if not args.resume:
        for old in folder.glob("round[0-9]*"):
            shutil.rmtree(old)
        common.remove_run(folder)
    images = []                                      # of all rounds so far
    rejected = []
    prompts = []
    for n in range(cfg.rounds):
        round_folder = folder / f"round{n + 1}"
        asked, indices = round_prompts(cfg, dataset, n)                          # P prompts
        if not (round_folder / "chosen.pt").exists():
            candidates = sample_candidates(cfg, pipeline, asked, n)              # (P, K, H, W, 3)
            scores = score(rewards, candidates, asked)                           # {reward: (P, K)}
            kept, best = select_best(scores, rewards.weights, cfg.keep)          # (M,), (M,)
            totals = aggregate_ranks(scores, rewards.weights)                    # (P, K)
            worst = totals.argmax(1)[kept]                                       # (M,), for dpo
            gain.report_round(n, scores, kept, best)
            gain.draw_candidates(rewards, candidates, scores, totals, asked,
                                 folder / "samples" / f"round{n + 1}.png")
            save_chosen(cfg, round_folder, candidates[kept, best], candidates[kept, worst],
                        [asked[i] for i in kept])
        best_images, worst_images, own_prompts = load_chosen(cfg, round_folder)
        images.append(best_images)
        rejected.append(worst_images)
        prompts += own_prompts
        if cfg.learn == "sft":
            n_real = round(cfg.real * len(own_prompts))
            for i in indices[:n_real]:
                image, caption, _ = dataset[i, f"{cfg.seed} {n} {i}"]   # draws the prompt again
                images.append(image[None])
                prompts.append(caption)
        finetune_lora(cfg, pipeline, torch.cat(images), prompts, n, round_folder, args,
                      torch.cat(rejected))
    save_model(cfg, pipeline, folder)


# ---------------------------------------------------------------------------------------- main
def load_base(cfg, args):
    """The base's pipeline, the folder of the data, and cfg with the base's identity in it."""
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    # the guidance is that of the tuned model, which has the base's other settings
    pipeline = load_pipeline(cfg.base, device, precision, guidance=cfg.guidance)
    data = toy.prepare(cfg.data, pipeline.cfg.clip, pipeline.image_size, cfg.llm, cfg.captioner,
                       cfg.segmenter)
    return pipeline, data, dataclasses.replace(cfg, base_identity=pipeline.identity())


def grade(cfg, tuned, rewards, data, folder, samples):
    """The figures of `gain.report`: of the base, each round, and the base with its own guidance."""
    paths = [cfg.base, *(folder / f"round{n + 1}" for n in range(cfg.rounds))]
    base, *rounds = [load_pipeline(path, tuned.device, tuned.precision) for path in paths]
    progress = [gain.measure(model, data, samples, rewards, steps=cfg.sample_steps,
                             guidance=cfg.guidance) for model in (base, *rounds)]
    _, own = judge.accuracy(base, data, samples, steps=cfg.sample_steps)
    return gain.report(progress, own["all"], gain.rendered_diversity(tuned, data), folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true",
                        help="run all rounds; on the toy world, print what was gained")
    parser.add_argument("--samples", type=common.positive, default=2048,
                        help="held-out captions to grade (default %(default)s)")
    common.add_training_flags(parser, "run folder (default runs/fine_rewards)", QUICK)
    common.add_config_flags(parser, Config, PRESETS)
    args = common.parse_args(parser, QUICK)
    if not args.train:
        parser.print_help()
        return
    cfg = common.make_config(Config, PRESETS, args)
    folder = Path(args.out or "runs/fine_rewards")
    common.check_run(folder, args)
    pipeline, data, cfg = load_base(cfg, args)
    begin = time.time()
    rewards = Rewards(cfg, pipeline)
    dataset = image_data.CaptionedImages(data, "train", pipeline.image_size)
    raft(cfg, pipeline, rewards, dataset, folder, args)
    if cfg.data != "shapes":
        validation.report(pipeline, data, folder, args.samples, begin)
        return
    figures = grade(cfg, pipeline, rewards, data, folder, args.samples)
    common.finish(folder, figures, begin)


if __name__ == "__main__":
    common.entry(main)
