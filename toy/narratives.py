"""How well narrative prompts are understood on the toy world, and whether plain captions still are.

`pipeline` is that of `uvit_fusion`; `base` and `adapted` are without and with an adapter of
`sur_adapter`; `llm` is the folder of an LLM that can put a narrative into plain words.
"""
import numpy as np
import torch
from tqdm import trange

import common
import encoders
from toy import judge
from toy.gain import clip_distance
from toy.language import IN_PLAIN_WORDS, narrative_prompts
from toy.shapes import FIELDS, keywords

# the prompts that are graded: captions, and narratives with a hard pair of words of this kind
KINDS = {"plain": None, "narrative": "new pair", "unheard": "unheard"}


def grade(pipeline, data, samples, steps, kinds=KINDS, rewrite=None):
    """Generates held-out scenes from prompts of several kinds, with the same noise.

    Returns two dicts with the `kinds` as keys: images (N, H, W, 3), and their tables from
    `judge.grade_images`. rewrite: a function that changes the prompts, such as a `Rewriter`.
    """
    scenes, captions, unseen = judge.validation_scenes(data, samples)
    images = {}
    tables = {}
    for kind in kinds:
        prompts = captions if kind == "plain" else narrative_prompts(scenes, KINDS[kind])
        if rewrite:
            prompts = rewrite(prompts)
        images[kind] = pipeline.generate(prompts, steps=steps, progress=True)
        tables[kind] = judge.grade_images(images[kind], scenes, unseen)
    return images, tables


class Rewriter:
    """An LLM that puts prompts into plain words, greedily: a rival that needs it to generate."""
    def __init__(self, path, device="cpu"):
        self.model, self.tokenizer = encoders.load_pretrained(
            "AutoModelForCausalLM", path, "--llm", "language model", device)
        self.tokenizer.padding_side = "left"

    @torch.no_grad()
    def __call__(self, prompts):
        rewritten = []
        for start in trange(0, len(prompts), 256, desc="rewriting", leave=False):
            questions = [prompt + IN_PLAIN_WORDS for prompt in prompts[start:start + 256]]
            tokens = self.tokenizer(questions, padding=True, return_tensors="pt")
            ids = tokens.input_ids.to(self.model.device)
            mask = tokens.attention_mask.to(self.model.device)
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
            rewritten += self.tokenizer.batch_decode(
                output[:, ids.shape[1]:], skip_special_tokens=True)
        return [text.strip() for text in rewritten]


def report(base, adapted, llm, data, folder, samples, steps):
    """Prints a table, draws samples/narratives.png, returns the figures of results.json."""
    base_images, base_tables = grade(base, data, samples, steps)
    images, tables = grade(adapted, data, samples, steps)
    rewriter = Rewriter(llm, base.device)
    _, rewritten = grade(base, data, samples, steps, ("narrative", "unheard"), rewriter)
    figures = {}
    rows = [["right, %", "base", "with the adapter", "+-", "LLM rewrites, base draws", "+-"]]
    for name in (*KINDS, *FIELDS):                               # the fields of narratives
        kind = name if name in KINDS else "narrative"
        field = name if name in FIELDS else "all"
        figures |= common.percent(f"base_{name}", base_tables[kind][field])
        figures |= common.percent(name, tables[kind][field])
        rival = ["", ""]
        if kind in rewritten:
            rival = common.percent("", rewritten[kind][field]).values()
        rows.append([f"{kind}, {field}", figures[f"base_{name}"], figures[name],
                     figures[f"{name}_ci"], *rival])
    common.print_table(rows, f"{folder}: {samples} held-out scenes, {steps} sampling steps")
    figures |= common.percent("rewriting", rewritten["narrative"]["all"])
    figures |= common.percent("rewriting_unheard", rewritten["unheard"]["all"])

    # what the adapter costs plain captions, image by image, and its size
    figures |= common.percent("plain_loss", base_tables["plain"]["all"] - tables["plain"]["all"])
    # max: an untrained base gets no caption right
    figures["narrative_share"] = 100 * figures["narrative"] / max(1, figures["base_plain"])
    adapter_size = sum(p.numel() for p in adapted.text_encoder.adapter.parameters())
    base_size = sum(p.numel() for p in base.model.parameters())
    figures["adapter_share"] = 100 * adapter_size / base_size
    clip = encoders.ClipScorer(base.cfg.clip, base.device)
    figures["distance_base"] = clip_distance(base_images["plain"], data, clip)
    figures["distance"] = clip_distance(images["plain"], data, clip)
    print(f"plain captions, image by image: {figures['plain_loss']:.1f} +- "
          f"{figures['plain_loss_ci']:.1f} points lost; CLIP distance to real images "
          f"{figures['distance']:.4f}, for the base {figures['distance_base']:.4f}")
    draw(base, adapted, data, folder, steps)
    return figures


def draw(base, adapted, data, folder, steps):
    """Draws samples/narratives.png: by the base, with the adapter, keyword prompts by the base."""
    scenes, _, _ = judge.validation_scenes(data, 8)
    narratives = narrative_prompts(scenes)
    prompts = [keywords(scene) for scene in scenes]
    images = [base.generate(narratives, steps=steps), adapted.generate(narratives, steps=steps),
              base.generate(prompts, steps=steps)]
    path = folder / "samples" / "narratives.png"
    common.image_grid(np.concatenate(images), [""] * 8 + narratives + prompts, path, columns=8,
                      titles=["base", "with the adapter", "base, keyword prompts"])
    print(f"narratives, drawn: {path}")
