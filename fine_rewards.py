r"""Fine-grained semantic rewards, and learning from what they rank first (arXiv 2305.19599).

The idea. Let the model draw several candidates for a prompt, let experts read them, and train on the candidate that was read best. Two experts
look at meaning: a captioner tells what a picture shows as a whole, a segmenter names its parts, and a language model says whether such a part
belongs into the scene. Rewards of different kinds have no common unit, so they vote by rank.

    caption reward   R(x, p) = cos(CLIP(captioner(x)), CLIP(p))                         CLIP's text tower, twice
    SAM reward       R(x, p) = (sum_i s_i - 2 n) / (2 n),   s_i = sum_v v P_LLM(v | p, l_i),   v = 1, 2, 3
                     of the labels l_1 .. l_n of the parts of x; -0.5 where there is no part. It cannot see what is missing, nor a wrong count
    CLIP reward      R(x, p) = cos(CLIP(x), CLIP(p))
    aesthetic reward R(x) = w CLIP(x) + b

    rank_r(k) = 0 for the best of the K candidates under reward r, ..., K - 1 for the worst; equals share their mean rank
    chosen    = argmin_k sum_r weight_r rank_r(k), the first of equals                  one picture a prompt
    L         = | network(x_t, t, p) - target |^2 on the chosen pictures, LoRA on all attention, nothing else moves

A round draws with the network as it is, scores, chooses and tunes on all that has been chosen so far; the next begins with what came out (RAFT,
reward-ranked fine-tuning).

    python fine_rewards.py --train                            # from the half-trained flagship: 11 min on two CPU cores, from 61 to 76 % right
    python fine_rewards.py --compare                          # each reward alone, their sum, random ones, real pictures
    python fine_rewards.py --analyse                          # how often each reward sets a right caption above a wrong one
    python sample.py "two red circles above a blue square" --run runs/fine_rewards
    python fine_rewards.py --train --preset paper --base runs/coco256 --data coco

Differs from the paper (its released code in brackets):
 1. A candidate is scored against its own prompt, all K of them [against others', and two never]; ranks are ranks [an argsort, and the worst won].
 2. The parts' labels come from a segmenter, refined by SAM with --sam [tags of Tag2Text, SAM was never run].
 3. The LLM's score of a label is expected under its next-token probabilities, each label in a fresh context [digits picked from generated text,
    list numbers among them, one conversation for all pictures].
 4. The CLIP and the aesthetic reward are open models' [a CLIP tuned to human preference]; toy: caption, SAM and CLIP reward vote, with weights
    1, 0.5 and 1. None of them sees relations there: the captioner tells them, but the tiny CLIP, which compares the texts, does not.
 5. toy: a U-ViT stopped half-way [Stable Diffusion 1.5], LoRA of rank 32 [4], AdamW 2e-3 [9e-6], batches of 64 [8], and of the chosen pictures
    the best 80 % [all].
 6. The network is tuned with captions dropped as it was trained, and on the pictures of all rounds so far [not known].
 7. toy: candidates are drawn with little guidance, and the tuned network draws with none [not known]. Strong guidance takes variety from the
    candidates, the tuned network passes that on, and guiding that again takes more.
"""
import argparse
import copy
import dataclasses
import functools
import math
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import uvit_fusion
from common import UserError, setting

REWARDS = ("caption", "sam", "clip", "aesthetic")
INSTRUCTIONS = {
    "toy": "scene: {prompt}. {label}:",                                       # the lines that the tiny LLM was trained on
    "paper": "A picture was made for the description: {prompt}\nOne part of the picture has been recognised as: {label}\nHow likely is it that "
             "a {label} appears in the scene that is described? Answer 3 if it is certain, 2 if it is possible, 1 if it is unlikely.\nAnswer:"}


@dataclass
class Settings:
    """Everything that makes a run: saved as config.json, read back by whatever loads the run."""
    # what it stands on
    base: str = setting("runs/uvit_fusion/early.safetensors", "run of uvit_fusion.py, or a file of weights in one, that is tuned")
    captioner: str = setting("runs/toy/captioner", "model that tells what a picture shows: a folder in the Hugging Face format or a name on its hub")
    segmenter: str = setting("runs/toy/segmenter", "model of semantic segmentation whose labels name the parts of a picture, likewise")
    sam: str = setting("", "Segment Anything model that refines the parts (default: the connected parts of the segmenter's map)")
    llm: str = setting("runs/toy/llm", "causal language model that scores the labels")
    clip_model: str = setting("", "CLIP of text and pictures that rewards are measured with (default: the one whose text the base reads)")
    scorer: str = setting("runs/toy/quality.safetensors", "linear head on CLIP features, for the aesthetic reward")
    instruction: str = setting("toy", f'what the LLM is asked: {" or ".join(INSTRUCTIONS)}, or a text with {{prompt}} and {{label}} in it')
    # the rewards
    weights: tuple = setting((1.0, 0.5, 1.0, 0.0), f"of the ranks by {', '.join(REWARDS)} (0: not computed)", low=0)
    choose: str = setting("ranks", '"ranks": the candidate with the smallest weighted sum of ranks; "sum": the largest sum of rewards, each of '
                          'deviation 1; "random"; "real": no candidates, pictures of the data set', choices=("ranks", "sum", "random", "real"))
    candidates: int = setting(10, "K, pictures drawn for a prompt", low=1)
    keep: float = setting(0.8, "share of the prompts, those whose chosen pictures rank best among all, that are learnt from", above=0, high=1)
    smallest: float = setting(0.012, "parts below this share of a picture are not counted", low=0, high=1)
    # the rounds
    rounds: int = setting(2, "R, times that candidates are drawn and learnt from", low=1)
    prompts: int = setting(2000, "a round", low=1)
    sample_steps: int = setting(10, "network evaluations a candidate", low=1)
    candidate_guidance: float = setting(1.5, "w that candidates are drawn with", low=0)
    guidance: float = setting(1.0, "w that the tuned network draws with (1: none, since it has learnt from guided candidates)", low=0)
    steps: int = setting(400, "training steps a round", low=1)
    batch: int = setting(64, "pictures a step", low=1)
    rank: int = setting(32, "of LoRA, on q, k, v and out of all attention", low=1)
    lr: float = setting(2e-3, "highest learning rate of AdamW", above=0)
    warmup: int = setting(20, "steps of linear warm-up", low=0)
    decay: float = setting(1.0, "share of the steps, at the end, over which the rate falls to zero along a cosine", low=0, high=1)
    weight_decay: float = setting(0.01, "of AdamW", low=0)
    clip_grad: float = setting(1.0, "largest norm of the gradient (0: no clipping)", low=0)
    drop: float = setting(0.1, "share of captions replaced by the empty one", low=0, high=1)
    seed: int = setting(0, "of prompts, noise and order", low=0, high=10**6)
    # where the prompts come from
    data: str = setting("shapes", '"shapes" (the toy world), a folder in the layout of MS-COCO, or one of pictures with a .txt beside each')
    base_identity: str = ""        # of the network that is tuned and its text encoder, down to the weights; set from them
    method: str = "fine_rewards"

    def __post_init__(self):
        """Raises UserError for settings that are out of range or do not fit together."""
        common.check_limits(self)
        if self.choose in ("ranks", "sum") and not any(self.weights):
            raise UserError(f"--weights: one of {', '.join(REWARDS)} must have a weight above 0")
        if not all(place in INSTRUCTIONS.get(self.instruction, self.instruction) for place in ("{prompt}", "{label}")):
            raise UserError(f'--instruction {self.instruction}: choose {" or ".join(INSTRUCTIONS)}, or a text with {{prompt}} and {{label}} in it')


PRESETS = {
    "toy": {},
    "paper": dict(base="runs/coco256", captioner="Salesforce/blip2-opt-2.7b", segmenter="nvidia/segformer-b0-finetuned-ade-512-512",
                  sam="facebook/sam-vit-base", llm="lmsys/vicuna-7b-v1.5", clip_model="openai/clip-vit-large-patch14", instruction="paper",
                  weights=(1.0, 1.0, 0.0, 0.0), keep=1.0, rounds=2, sample_steps=50, candidate_guidance=2.0, guidance=2.0, prompts=10_000, steps=5000,
                  batch=8, rank=4, lr=9e-6, warmup=0, decay=0.0, data="coco"),
}


# --------------------------------------------------------------------------------------------------------- what experts see
class Captioner:
    """Pictures uint8 (N, H, W, 3) -> N captions, by any AutoModelForImageTextToText."""
    def __init__(self, path, device, dtype):
        self.device, self.dtype = device, dtype
        self.model, self.processor = common.load_pretrained("AutoModelForImageTextToText", path, "--captioner", "captioner", device, "AutoProcessor",
                                                            dtype=dtype)

    @torch.no_grad()
    def __call__(self, pictures):
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device, self.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=30, do_sample=False)
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def connected_parts(labels):
    """Connected parts (4 neighbours) of equal label in label maps (N, H, W): numbers (N, H, W), 0 where the label is 0, the background."""
    n, h, w = labels.shape
    parts = torch.where(labels > 0, torch.arange(1, h * w + 1, device=labels.device).view(1, h, w), 0)
    while True:                                                               # the largest number spreads through its part
        grown = parts
        for dim, shift in ((1, 1), (1, -1), (2, 1), (2, -1)):
            near, other = grown.roll(shift, dim), labels.roll(shift, dim).clone()
            other.select(dim, 0 if shift == 1 else -1).fill_(0)               # what comes in from the other edge is no neighbour
            grown = torch.where(other == labels, torch.maximum(grown, near), grown)
        grown = torch.where(labels > 0, grown, 0)
        if torch.equal(grown, parts):
            return parts
        parts = grown


class Segmenter:
    """Pictures uint8 (N, H, W, 3) -> N lists of parts (label, mask (H, W) bool), by any AutoModelForSemanticSegmentation, refined by SAM."""
    def __init__(self, path, device, dtype, sam="", smallest=0.012):
        self.device, self.smallest = device, smallest
        self.model, self.processor = common.load_pretrained("AutoModelForSemanticSegmentation", path, "--segmenter", "segmenter", device,
                                                            "AutoImageProcessor")
        self.names = {i: name for i, name in self.model.config.id2label.items()}
        self.sam = Masks(sam, device) if sam else None

    @torch.no_grad()
    def label_maps(self, pictures):
        """(N, H, W) of label numbers; 0 is the background if the model has one."""
        logits = self.model(**self.processor(images=list(pictures), return_tensors="pt").to(self.device)).logits
        maps = F.interpolate(logits.float(), pictures.shape[1:3], mode="bilinear").argmax(1)
        return maps if self.names[0] == "background" else maps + 1            # then all labels are parts

    def __call__(self, pictures):
        maps = self.label_maps(pictures)
        shift = 0 if self.names[0] == "background" else 1
        if self.sam:
            masks = [self.sam(picture) for picture in pictures]
        else:
            masks = [[part == number for number in part.unique() if number] for part in connected_parts(maps)]
        found = []
        for labels, some in zip(maps, masks):
            parts = [(int(labels[mask].mode().values), mask.cpu().numpy()) for mask in some if mask.float().mean() >= self.smallest]
            found.append([(self.names[label - shift], mask) for label, mask in parts if label])
        return found


class Masks:
    """All that Segment Anything finds in a picture uint8 (H, W, 3): a list of masks (H, W) bool, asked for at a grid of points.

    Of masks that overlap by more than half only the surest is kept (non-maximum suppression, on the masks themselves).
    """
    def __init__(self, path, device, side=16, sure=0.88, overlap=0.5):
        self.device, self.side, self.sure, self.overlap = device, side, sure, overlap
        self.model, self.processor = common.load_pretrained("SamModel", path, "--sam", "Segment Anything model", device, "SamProcessor")

    @torch.no_grad()
    def __call__(self, picture):
        h, w = picture.shape[:2]
        points = [[(x + 0.5) * w / self.side, (y + 0.5) * h / self.side] for y in range(self.side) for x in range(self.side)]
        inputs = self.processor(images=picture, input_points=[[[point] for point in points]], return_tensors="pt").to(self.device, torch.float32)
        out = self.model(**inputs)
        masks = self.processor.image_processor.post_process_masks(out.pred_masks.cpu(), inputs["original_sizes"].cpu(),
                                                                  inputs["reshaped_input_sizes"].cpu())[0].flatten(0, 1)      # (points x 3, H, W)
        scores, kept = out.iou_scores.flatten().cpu(), []
        for i in scores.argsort(descending=True):
            if scores[i] < self.sure or not masks[i].any():
                continue
            if all((masks[i] & mask).sum() <= self.overlap * (masks[i] | mask).sum() for mask in kept):
                kept.append(masks[i])
        return kept


class LabelScorer:
    """How likely labels are in the scenes that prompts describe: [(prompt, label)] -> expected scores (N,), 1 to 3, by any causal LLM.

    Each pair is read by itself; what follows is not generated: the scores are weighed by the probabilities of "1", "2" and "3" as next token.
    """
    def __init__(self, path, instruction, device, dtype):
        self.device, self.known = device, {}
        self.instruction = INSTRUCTIONS.get(instruction, instruction)
        self.model, self.tokenizer = common.load_pretrained("AutoModelForCausalLM", path, "--llm", "language model", device, dtype=dtype)

    def tokens(self, prompt, label):
        """Token numbers of the question, as far as the three answers agree, and of the next one of each answer."""
        text = self.instruction.replace("{label}", label).replace("{prompt}", prompt)    # it may hold other braces
        ids = self.tokenizer([f"{text} {k}" for k in (1, 2, 3)]).input_ids
        common_part = os.path.commonprefix(ids)                               # a tokenizer may put the space into a token of its own
        return common_part, [row[len(common_part)] for row in ids]

    @torch.no_grad()
    def __call__(self, pairs, batch=128):
        new = sorted({pair for pair in pairs if pair not in self.known}, key=lambda pair: len(pair[0]) + len(pair[1]))
        for start in range(0, len(new), batch):
            rows, answers = zip(*(self.tokens(*pair) for pair in new[start:start + batch]))
            x = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)
            last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
            mask = torch.arange(x.shape[1], device=self.device) <= last[:, None]
            logits = self.model(input_ids=x, attention_mask=mask.long()).logits[torch.arange(len(x)), last].float()
            p = logits.gather(1, torch.tensor(answers, device=self.device)).softmax(1)
            self.known |= dict(zip(new[start:start + batch], (p @ torch.tensor([1.0, 2.0, 3.0], device=self.device)).tolist()))
        return np.array([self.known[pair] for pair in pairs])


# --------------------------------------------------------------------------------------------------------------- rewards
class Rewards:
    """The rewards whose weight is not 0, of pictures and their prompts. `seconds` tells how long each has taken so far."""
    def __init__(self, s, clip_path, device, precision):
        import eval as grade
        dtype = precision if device.type == "cuda" else torch.float32
        self.names = [name for name, weight in zip(REWARDS, s.weights) if weight]
        self.seconds = dict.fromkeys(self.names, 0.0)
        self.clip = grade.ClipScorer(s.clip_model or clip_path, device)
        self.captioner = Captioner(s.captioner, device, dtype) if "caption" in self.names else None
        self.segmenter = Segmenter(s.segmenter, device, dtype, s.sam, s.smallest) if "sam" in self.names else None
        self.labels = LabelScorer(s.llm, s.instruction, device, dtype) if "sam" in self.names else None
        self.aesthetic = grade.Aesthetic(s.scorer, self.clip) if "aesthetic" in self.names else None
        experts = (self.clip, self.captioner, self.segmenter, self.labels)
        self.identities = [common.fingerprint(expert.model) for expert in experts if expert]      # scores of others are not these

    def __call__(self, pictures, prompts):
        """pictures uint8 (N, H, W, 3), N prompts -> {reward: (N,)}, N captions (or ""), N lists of parts (label, mask) (or [])."""
        scores, captions, parts = {}, [""] * len(prompts), [[]] * len(prompts)
        for name in self.names:
            begin = time.perf_counter()
            if name == "caption":
                captions = self.captioner(pictures)
                scores[name] = (self.clip.texts(captions) * self.clip.texts(list(prompts))).sum(-1).cpu().numpy()
            elif name == "sam":
                parts = self.segmenter(pictures)
                scores[name] = sam_reward(parts, prompts, self.labels)
            elif name == "clip":
                scores[name] = (self.clip.images(pictures) * self.clip.texts(list(prompts))).sum(-1).cpu().numpy()
            else:
                scores[name] = self.aesthetic(pictures).cpu().numpy()
            self.seconds[name] += time.perf_counter() - begin
        return scores, captions, parts

    def scores(self, pictures, prompts, batch=256):
        """{reward: (N,)} of any number of pictures, some at a time."""
        parts = [self(pictures[i:i + batch], prompts[i:i + batch])[0] for i in range(0, len(prompts), batch)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.names}


def sam_reward(parts, prompts, score):
    """(sum_i s_i - 2 n) / (2 n) of the n parts of each picture; -0.5 where there are none. parts: N lists of (label, mask); -> (N,)."""
    pairs = [(prompt, label) for some, prompt in zip(parts, prompts) for label, _ in some]
    scores, rewards = iter(score(pairs) if pairs else ()), []
    for some in parts:
        s, n = [next(scores) for _ in some], len(some)
        rewards.append((sum(s) - 2 * n) / (2 * n) if n else -0.5)
    return np.array(rewards)


def ranks(rewards):
    """Rewards (..., K) -> ranks (..., K) as floats: 0 for the highest, K - 1 for the lowest, equals share their mean rank."""
    higher = (rewards[..., None, :] > rewards[..., :, None]).sum(-1)          # how many are higher than this one
    equal = (rewards[..., None, :] == rewards[..., :, None]).sum(-1)          # itself among them
    return higher + (equal - 1) / 2


def assemble(s, rewards):
    """What decides between candidates, the smallest first: {reward: (..., K)} -> (..., K)."""
    weights = {name: weight for name, weight in zip(REWARDS, s.weights) if weight}
    if s.choose == "sum":
        # less its mean, or one that is the same for all would be so large here that nothing could be told beside it
        return -sum(weight * (rewards[name] - rewards[name].mean()) / max(rewards[name].std(), 1e-9) for name, weight in weights.items())
    return sum(weight * ranks(rewards[name]) for name, weight in weights.items())


def kept(s, count):
    """How many of `count` prompts are learnt from."""
    return max(1, round(s.keep * count))


def choose(s, rewards, count, n):
    """Of `count` prompts in round n, {reward: (count, K)} -> numbers of the count x keep that are learnt from, and the chosen candidate of each."""
    if s.choose == "random":
        rng = np.random.default_rng((s.seed, n))
        return np.sort(rng.permutation(count)[:kept(s, count)]), rng.integers(s.candidates, size=kept(s, count))
    best = assemble(s, rewards).argmin(1)                                     # the first of equals
    chosen = {name: values[np.arange(count), best] for name, values in rewards.items()}
    among = np.sort(assemble(s, chosen).argsort(kind="stable")[:kept(s, count)])
    return among, best[among]


# ---------------------------------------------------------------------------------------------------------------- a round
def round_prompts(s, dataset, n):
    """The prompts of round n (from 0), (index of the picture, caption): no picture gives two of them before all have given one."""
    order = np.random.default_rng(s.seed).permutation(len(dataset))
    places = [int(order[i % len(order)]) for i in range(n * s.prompts, (n + 1) * s.prompts)]
    return places, [random.Random(f"{s.seed} {n} {i}").choice(dataset.items[i][1]) for i in places]


def draw_and_score(s, painter, rewards, prompts, folder, n, batch=None):
    """Draws K candidates of each of P prompts and scores them, into files in a folder; interrupted, it goes on there.

    Returns pictures uint8 (P, K, H, W, 3), {reward: (P, K)} and the seconds that the drawing took.
    """
    # prompts at a time: of large pictures one, since a segmenter's map has each pixel as often as it knows labels
    batch = batch or max(1, min(32, 2**18 // (s.candidates * painter.side**2)))
    made_from = {"prompts": prompts, "network": common.fingerprint(painter.model)}

    def repeated(start):
        return [prompt for prompt in prompts[start:start + batch] for _ in range(s.candidates)]

    def drawn(note):
        for start in range(note["done"], len(prompts), batch):
            pictures = painter.draw(repeated(start), steps=s.sample_steps, guidance=s.candidate_guidance, seed=s.seed + 1 + n,
                                    first=start * s.candidates)
            yield pictures.reshape(-1, s.candidates, *pictures.shape[1:])

    def scored(note):
        for start in range(note["done"], len(prompts), batch):
            values, _, _ = rewards(np.concatenate(candidates[start:start + batch]), repeated(start))
            yield np.stack([values[name] for name in rewards.names], -1).reshape(-1, s.candidates, len(rewards.names))
    shape, begin = (len(prompts), s.candidates, painter.side, painter.side, 3), time.perf_counter()
    candidates, _ = common.collect(folder / "candidates.npy", made_from, shape, np.uint8, drawn, f"round {n + 1}: drawing", "prompt")
    drawing, scores = time.perf_counter() - begin, np.zeros((*shape[:2], 0))
    if rewards.names:
        made_from |= {"rewards": rewards.names, "experts": rewards.identities}
        scores, _ = common.collect(folder / "scores.npy", made_from, (*shape[:2], len(rewards.names)), np.float32, scored,
                                   f"round {n + 1}: scoring", "prompt")
    return candidates, {name: np.array(scores[..., i]) for i, name in enumerate(rewards.names)}, drawing


@torch.no_grad()
def as_data(painter, pictures):
    """Drawn pictures uint8 (N, H, W, 3) as the data set would hold them for `Painter.to_x_0`: uint8 (N, 3, H, W), or moments of latents."""
    pictures = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    if painter.autoencoder is None:
        return pictures
    parts = (painter.autoencoder.encode(common.to_float(part.to(painter.device))) for part in pictures.split(16))
    return torch.cat([torch.stack(moments, dim=1).half().cpu() for moments in parts])


def tune(s, painter, pictures, prompts, folder, n, state, save_every=100):
    """Trains LoRA on captioned pictures by the loss that the base was trained with, and merges it into the painter's network.

    pictures: what `Painter.to_x_0` takes, of N prompts; folder: of the run; state: of this round when it was interrupted, or None.
    """
    base, device, model = painter.settings, painter.device, painter.model
    torch.manual_seed(s.seed + n)
    tuned = common.add_lora(copy.deepcopy(model), s.rank)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer, start = torch.optim.AdamW(trained, s.lr, weight_decay=s.weight_decay, fused=True), 0
    if state:
        common.load_into(tuned, state["tuned"], folder / "state.pt")
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    metrics, losses = common.Metrics(folder, ["step", "loss", "lr"], start, f"metrics{n + 1}.csv"), []
    generator, shape = torch.Generator(device), (s.batch, base.channels, base.size, base.size)
    uniform, normal = (functools.partial(draw, generator=generator, device=device) for draw in (torch.rand, torch.randn))
    draws = common.Draws(len(prompts), s.batch, start, s.steps, s.seed + n)
    with common.Interrupt() as interrupt, tqdm(draws, initial=start, total=s.steps, desc=f"round {n + 1}: learning", unit="step") as progress:
        for step, places in enumerate(progress, start + 1):
            places = [i for i, _ in places]
            optimizer.param_groups[0]["lr"] = s.lr * uvit_fusion.learning_rate(s, step)
            generator.manual_seed((100 * s.seed + n) * 10**7 + step)
            dropped = (uniform(s.batch) < s.drop).tolist()
            t = painter.diffusion.times(uniform(s.batch), base.time_power)      # as the base was trained
            eps = normal(shape)
            x_0 = painter.to_x_0(pictures[places], normal(shape) if painter.autoencoder else None)
            text, mask = painter.encoder(["" if drop else prompts[i] for drop, i in zip(dropped, places)])
            with common.autocast(device, painter.precision):
                loss = painter.diffusion.loss(functools.partial(tuned, text=text, mask=mask), x_0, t, eps)
            optimizer.zero_grad()
            loss.backward()
            if s.clip_grad:
                torch.nn.utils.clip_grad_norm_(trained, s.clip_grad)
            optimizer.step()
            losses.append(loss.detach())
            if step % 20 and step != s.steps and not interrupt.asked:
                continue
            mean, losses = torch.stack(losses).mean().item(), []
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at step {step} of round {n + 1}: try a lower --lr")
            metrics.add(step, mean, optimizer.param_groups[0]["lr"])
            progress.set_postfix(loss=f"{mean:.4f}")
            if interrupt.asked or step % save_every == 0:
                save_state(folder, {"round": n, "precision": str(painter.precision), "step": step, "tuned": tuned.state_dict(),
                                    "optimizer": optimizer.state_dict()})
            if interrupt.asked:
                print(f"stopped after step {step} of round {n + 1}; to go on: the same command with --resume")
                sys.exit(130)
    model.load_state_dict(common.merge_lora(tuned).state_dict())


def draw_round(s, painter, rewards, candidates, scores, prompts, path, columns=4):
    """A picture of a round: candidates of some prompts, the first in rank first, parts outlined, with captions, parts and scores below."""
    import sample
    pictures, texts = [], []
    for i, (prompt, row, order) in enumerate(zip(prompts[:columns], candidates, assemble(s, scores).argsort(axis=1, kind="stable"))):
        _, captions, parts = rewards(np.stack([row[k] for k in order]), [prompt] * len(order))
        for place, (k, caption, some) in enumerate(zip(order, captions, parts), 1):
            scale = max(1, 96 // row[k].shape[0])
            large = np.kron(row[k], np.ones((scale, scale, 1), np.uint8))
            for _, mask in some:                                              # its border, inside
                mask = np.pad(np.kron(mask, np.ones((scale, scale), bool)), 1)
                inside = mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
                large[mask[1:-1, 1:-1] & ~inside] = 0
            pictures.append(large)
            marks = " ".join(f"{name} {scores[name][i, k]:.2f}" for name in rewards.names)
            texts.append(". ".join(filter(None, [f"{place}", caption, ", ".join(label for label, _ in some), marks])))
    sample.picture_grid(pictures, texts, path, columns=s.candidates, titles=prompts[:columns])


def best_of_round(s, painter, rewards, dataset, folder, n):
    """What round n has to learn from: {"pictures": as `Painter.to_x_0` takes them, (N, ...), "prompts": theirs}. Leaves a table and a picture.

    candidates.npy and scores.npy stay in the folder of the round and may be deleted once it is done; chosen.pt, of which later rounds learn, not.
    """
    import eval as grade
    places, prompts = round_prompts(s, dataset, n)
    if s.choose == "real":                                                    # as many as the others keep
        places, prompts = places[:kept(s, s.prompts)], prompts[:kept(s, s.prompts)]
        (folder / f"round{n + 1}").mkdir(exist_ok=True)
        found = []
        for i, prompt in zip(places, prompts):
            try:
                found.append((dataset.picture(i), prompt))
            except common.BROKEN as error:
                print(f"warning: {dataset.items[i][0]} cannot be read ({error}) and is left out")
        if not found:
            raise UserError(f"--data {s.data}: none of {len(places)} pictures could be read")
        pictures, prompts = zip(*found)
        return {"pictures": torch.stack(pictures), "prompts": list(prompts)}
    begin, before = time.perf_counter(), dict(rewards.seconds)
    candidates, scores, drawing = draw_and_score(s, painter, rewards, prompts, folder / f"round{n + 1}", n)
    among, best = choose(s, scores, len(prompts), n)
    spent = {"drawing": drawing} | {name: rewards.seconds[name] - before[name] for name in rewards.names}
    rows = [["", "all candidates", "chosen", "pictures a second", "share of the time, %"]]
    for name, seconds in spent.items():
        means = (f"{scores[name].mean():.3f}", f"{scores[name][among, best].mean():.3f}") if name in scores else ("", "")
        rows.append([name, *means, candidates.shape[0] * s.candidates / seconds if seconds > 0.1 else math.nan,
                     100 * seconds / (time.perf_counter() - begin)])
    grade.print_table(rows, f"round {n + 1}: {len(candidates)} prompts, {s.candidates} candidates each, {len(among)} pictures to learn from")
    if rewards.names:
        draw_round(s, painter, rewards, candidates, scores, prompts, folder / "samples" / f"round{n + 1}.png")
    return {"pictures": as_data(painter, candidates[among, best]), "prompts": [prompts[i] for i in among]}


def run(s, painter, dataset, data, folder, options, samples=512):
    """All rounds, in a run folder; the painter's network is tuned in place. On the toy world each round's end is judged, from `samples` captions.

    A run that was interrupted goes on with options.resume, in the round and step where it stopped.
    """
    import eval as grade
    import sample
    rewards = Rewards(s, painter.settings.clip, painter.device, painter.precision)      # first: a slip in its flags should leave no folder
    state = common.open_run(folder, s, options, painter.precision)
    if not state:
        for old in folder.glob("round[0-9]*"):
            shutil.rmtree(old)
        common.write_json(folder / "uvit.json", dataclasses.asdict(painter.settings))
        state = {"round": 0, "precision": str(painter.precision)}
        save_state(folder, state)
    if state["round"]:
        weights = folder / f"round{state['round']}.safetensors"
        common.load_into(painter.model, common.read_weights(weights, weights), weights)
    known = "scene" in dataset.items[0][2]
    metrics = common.Metrics(folder, ["round", "judged", *rewards.names], state["round"], "rewards.csv")

    def look(n):                                                              # what the judge and the rewards say of held-out captions
        if known:
            scenes, captions, unseen = grade.validation_prompts(data, painter.settings.size, samples)
            pictures = painter.draw(captions, steps=s.sample_steps)
            means = [float(values.mean()) for values in rewards.scores(pictures, captions).values()] if rewards.names else []
            metrics.add(n, float(grade.judged(pictures, scenes, unseen)[1]["all"].mean()), *means)
            sample.plot({name: metrics.column(name) for name in ("judged", *rewards.names)}, folder / "rewards.png", "round",
                        "held-out captions: share judged right, and mean rewards")
    if state["round"] not in dict(metrics.column("judged")):                  # also where that look was interrupted
        look(state["round"])
    if state["round"] == s.rounds:                                            # what was learnt from is needed no more, and may be gone
        return
    pictures, prompts = [], []                                                # of all rounds so far: variety, which one round has too little of
    for n in range(s.rounds):
        learnt = folder / f"round{n + 1}" / "chosen.pt"
        if n < state["round"] and not learnt.exists():
            raise UserError(f"{learnt} is gone, of which the further rounds learn too: put it back, or start anew with --overwrite")
        if not learnt.exists():
            best = best_of_round(s, painter, rewards, dataset, folder, n)
            with common.whole(learnt) as unfinished:
                torch.save(best, unfinished)
        chosen = torch.load(learnt, weights_only=True)
        pictures, prompts = [*pictures, chosen["pictures"]], [*prompts, *chosen["prompts"]]
        if n < state["round"]:
            continue
        tune(s, painter, torch.cat(pictures), prompts, folder, n, state if "step" in state else None)
        for name in ("model", f"round{n + 1}"):                               # the second is what goes with the state: no moment is without its own
            common.save_tensors(painter.model.state_dict(), folder / f"{name}.safetensors")
        state = {"round": n + 1, "precision": str(painter.precision)}
        save_state(folder, state)
        look(n + 1)


def save_state(folder, state):
    with common.whole(folder / "state.pt") as unfinished:
        torch.save(state, unfinished)


def load(path, device, precision):
    """The painter of a run folder, or of a .safetensors file in one."""
    folder, weights = common.run_files(path)
    base = common.read_settings(uvit_fusion.Settings, folder, "uvit.json")
    tensors = common.read_weights(weights, f"checkpoint {weights}")
    return uvit_fusion.make_painter(base, common.TextEncoder(base.clip, device), tensors, weights, folder, precision)


def starting_painter(s, args):
    """The painter that a run begins with: the base, which draws with the guidance that the run ends with."""
    import sample
    painter = sample.load_or_train(s.base, args.device, args.precision)
    painter.settings = dataclasses.replace(painter.settings, guidance=s.guidance)
    return painter


# ----------------------------------------------------------------------------------------------------------------- grading
def diversity(pictures, clip, each):
    """Mean distances between pictures of one prompt, over all pairs: of pixels in [0, 1] the root mean square, and 1 - cos of CLIP's features.

    pictures: uint8 (prompts x each, H, W, 3), those of a prompt side by side. The second sees wrong pictures among right ones, but hardly where
    in a picture things stand; the first sees that.
    """
    pixels, features = torch.from_numpy(pictures).flatten(1).float().div(255).unflatten(0, (-1, each)), clip.images(pictures).unflatten(0, (-1, each))
    apart = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist") / pixels.shape[-1]**0.5      # exactly 0 on the diagonal
    return tuple(float(some.mean()) * each / (each - 1) for some in (apart, 1 - features @ features.mT))


def measure(painter, data, samples, steps, few=64, each=8):
    """Held-out captions, picture i from noise i: verdicts of the judge (N,), and {tiny-CLIP "distance" to real pictures, "diversity",
    "clip_diversity"}, the latter of `each` pictures of the first `few` captions."""
    import eval as grade
    scenes, captions, unseen = grade.validation_prompts(data, painter.settings.size, samples)
    pictures = painter.draw(captions, steps=steps, progress=True)
    clip = grade.ClipScorer(painter.settings.clip, painter.device)
    (distance,) = grade.clip_distances(clip, data, pictures)
    varied = diversity(painter.draw([caption for caption in captions[:few] for _ in range(each)], steps=steps, seed=5), clip, each)
    return grade.judged(pictures, scenes, unseen)[1]["all"], {
        "distance": distance, "diversity": varied[0], "clip_diversity": varied[1]}


def real_diversity(clip_path, data, side, few=64, each=8):
    """The same diversities of rendered pictures of the same captions."""
    import eval as grade
    from toy import shapes
    scenes, rng = grade.validation_prompts(data, side, few)[0], random.Random(5)
    pictures = np.stack([shapes.render(shapes.layout(scene, rng), side, rng) for scene in scenes for _ in range(each)])
    return dict(zip(("diversity", "clip_diversity"), diversity(pictures, grade.ClipScorer(clip_path), each)))


def analyse(s, painter, data, samples):
    """How often each reward, and the choice by all of them, sets the right caption of a real picture above one with a single field changed, %.

    Equals count a half, so that 50 is chance. Prints a table and returns its figures.
    """
    import eval as grade
    from toy import shapes
    if not any(s.weights):
        raise UserError(f"--analyse: one of {', '.join(REWARDS)} must have a --weights above 0")
    rewards, rng = Rewards(s, painter.settings.clip, painter.device, painter.precision), random.Random(0)
    dataset, (scenes, captions, _) = common.CaptionedImages(data, "val", painter.side), grade.validation_prompts(data, painter.settings.size, samples)
    rows, figures = [["right above wrong, %", *rewards.names, "all"]], {}
    for field in ("count", "colour", "shape", "relation"):
        places = [i for i, scene in enumerate(scenes) if scene.relation or field != "relation"]
        wrong = [shapes.sentence(shapes.change_field(scenes[i], field, rng), rng) for i in places]
        pictures = [dataset.picture(i).permute(1, 2, 0).numpy() for i in places]
        both = rewards.scores(np.stack(pictures * 2), [captions[i] for i in places] + wrong)
        values = {name: some.reshape(2, -1).T for name, some in both.items()}                                                   # (N, 2)
        ahead = {name: some[:, 0] - some[:, 1] for name, some in values.items()} | {"all": np.subtract(*assemble(s, values).T[::-1])}
        found = {f"{field}_{name}": 50 * float(1 + np.sign(some).mean()) for name, some in ahead.items()}
        rows.append([field, *found.values()])
        figures |= found
    grade.print_table(rows, f"{len(scenes)} rendered held-out pictures, each with its caption and with one that is wrong in one field")
    return figures


COMPARED = {                                                                  # name: what is changed
    "real_pictures": {"choose": "real", "weights": (0.0,) * 4},
    "random": {"choose": "random", "weights": (0.0,) * 4},
    "clip_only": {"choose": "ranks", "weights": (0.0, 0.0, 1.0, 0.0)},
    "caption_only": {"choose": "ranks", "weights": (1.0, 0.0, 0.0, 0.0)},
    "sam_only": {"choose": "ranks", "weights": (0.0, 1.0, 0.0, 0.0)},
    "sum": {"choose": "sum"},
    "rank_sum": {"choose": "ranks"},
}


def compare(s, dataset, data, folder, args, options):
    """Runs each way to choose with the same budget, judges it on the same captions and noise, and prints one table.

    A run that is finished is kept, and one that was interrupted goes on, so the command can be given again.
    """
    import eval as grade
    import sample
    rows, figures, right = [["all right, %", "", "+-", "gain", "+-", "distance", "diversity", "diversity, CLIP"]], {}, {}
    for name, change in {"start": None, **COMPARED}.items():
        one, out = dataclasses.replace(s, **change or {}), folder / name
        if change is not None:
            run(one, starting_painter(s, args), dataset, data, out, common.pick_up(options, out))
        painter = starting_painter(s, args) if change is None else sample.load_run(out, args.device, args.precision)
        right[name], seen = measure(painter, data, args.samples, s.sample_steps)
        share, gained = grade.percent(name, right[name]), grade.percent("gain", right[name] - right["start"])
        figures |= share | {f"{name}_{what}": value for what, value in seen.items()}
        rows.append([name, *share.values(), *(gained.values() if change else ("", "")), *(f"{value:.4f}" for value in seen.values())])
        grade.write_results(folder, figures)
    grade.write_results(folder, figures | grade.percent("gain_over_random", right["rank_sum"] - right["random"]))
    grade.print_table(rows, f"{folder}: {args.samples} held-out captions, {s.sample_steps} steps; {s.rounds} rounds of {s.prompts} prompts")
    for name, verdicts in right.items():
        if name != "rank_sum":
            gain = grade.percent("gain", right["rank_sum"] - verdicts)
            print(f"rank_sum is ahead of {name} by {gain['gain']:.1f} +- {gain['gain_ci']:.1f} points, picture by picture")


# -------------------------------------------------------------------------------------------------------------------- main
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    action.add_argument("--train", action="store_true", help="all rounds; on the toy world, what was gained, as a table")
    action.add_argument("--compare", action="store_true", help="the same with each reward alone, and with none (long)")
    action.add_argument("--analyse", action="store_true", help="how often each reward sets a right caption above a wrong one")
    parser.add_argument("--samples", type=common.positive, default=2048, help="held-out captions to grade (default %(default)s)")
    common.add_training_flags(parser, Settings, PRESETS, "run folder (default runs/fine_rewards; --compare: runs/rewards_compare; --analyse: "
                              "runs/rewards_analyse)", "resume", "overwrite")
    args = parser.parse_args()
    if not (args.train or args.compare or args.analyse):
        parser.print_help()
        return
    import eval as grade
    import sample
    import toy
    s, options = common.make_settings(Settings, PRESETS, args), common.make_settings(common.Options, None, args)
    folder = Path(args.out or ("runs/fine_rewards" if args.train else "runs/rewards_compare" if args.compare else "runs/rewards_analyse"))
    if args.train:
        common.check_run(folder, options)
    elif s.data != "shapes":
        raise UserError("--compare and --analyse grade with the exact judge of the toy world: without --data")
    if args.samples < 2:
        raise UserError("--samples 1: a distance between two sets of pictures needs more")
    base = starting_painter(s, args)
    s = dataclasses.replace(s, base_identity=base.identity())
    data = toy.prepare(s.data, base.settings.clip, base.side, s.llm, s.captioner, s.segmenter)
    begin = time.time()
    dataset = base.data(data, "train")
    if args.compare:
        compare(s, dataset, data, folder, args, options)
        return
    if args.analyse:
        grade.write_results(folder, analyse(s, base, data, args.samples))
        return
    painter = copy.copy(base)
    painter.model, painter.folder = copy.deepcopy(base.model), folder
    run(s, painter, dataset, data, folder, options)
    if s.data != "shapes":
        grade.report(painter, data, args.samples, begin, __file__)
        return
    seconds, (before, first), (after, last) = time.time() - begin, *(measure(one, data, args.samples, s.sample_steps) for one in (base, painter))
    real = real_diversity(base.settings.clip, data, base.side)
    as_is = sample.load_run(s.base, args.device, args.precision)              # the base as it draws by itself
    own = grade.alignment(as_is, data, args.samples, {"steps": s.sample_steps})[1]["all"]
    figures = grade.percent("start", before) | grade.percent("final", after) | grade.percent("gain", after - before) | grade.percent("start_own", own)
    rows = [[f"{len(before)} held-out captions, guidance {s.guidance:g}", "start", "after", "+-", "real"],
            ["all right, %", figures["start"], figures["final"], figures["final_ci"], ""],
            [f"with the base's own guidance, {as_is.settings.guidance:g}", figures["start_own"], "", "", ""]]
    for name, label in (("distance", "tiny-CLIP distance to real pictures"), ("diversity", "pictures of one caption: distance of pixels"),
                        ("clip_diversity", "pictures of one caption: 1 - cos of tiny-CLIP features")):
        seen = {"start": first, "final": last, "real": real}
        figures |= {f"{name}_{when}": some[name] for when, some in seen.items() if name in some}
        rows.append([label, f"{first[name]:.4f}", f"{last[name]:.4f}", "", f"{real[name]:.4f}" if name in real else ""])
    grade.print_table(rows, f"{folder}: {s.rounds} rounds, {s.sample_steps} sampling steps")
    print(f"gained, picture by picture: {figures['gain']:.1f} +- {figures['gain_ci']:.1f} points; {seconds:.0f} s for the rounds, "
          f"{time.time() - begin:.0f} s in all; figures in {folder / 'results.json'}")
    grade.write_results(folder, figures | {"seconds": time.time() - begin})


if __name__ == "__main__":
    common.entry(main)
