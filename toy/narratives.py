"""How well narrative prompts are understood on the toy world, and whether plain captions still are.

`pipeline` is that of `uvit_fusion`; `base` and `adapted` are without and with an adapter of
`sur_adapter`; `llm` is the folder of an LLM that can say a narrative in plain words.
"""
import numpy as np
import torch
from tqdm import trange

import common
import encoders
from common import UserError
from toy import judge
from toy.gain import clip_distance
from toy.language import IN_PLAIN_WORDS, narrative_prompts
from toy.shapes import FIELDS, keywords

# the prompts that are graded: of the scenes' captions, and narratives with a pair of this kind
KINDS = {"plain": None, "narrative": "new pair", "unheard": "unheard"}


def prompts_of(kind, scenes, captions):
    """The prompts of one of KINDS for validation scenes."""
    return captions if kind == "plain" else narrative_prompts(scenes, KINDS[kind])


def grade(pipeline, data, samples, first=0, kinds=KINDS, rewrite=None, **sampling):
    """Generates held-out scenes from prompts of several kinds, with the same noise.

    Returns two dicts with the `kinds` as keys: images (N, H, W, 3), and their tables by
    `judge.grade_images`. first: scenes before it are left out; rewrite: changes the prompts;
    sampling: more for `pipeline.generate`.
    """
    scenes, captions, unseen = judge.validation_scenes(data, first + samples)
    if first >= len(scenes):
        raise UserError(f"--first {first}: {data} has only {len(scenes)} validation scenes")
    images = {}
    tables = {}
    for kind in kinds:
        prompts = prompts_of(kind, scenes, captions)[first:]
        if rewrite:
            prompts = rewrite(prompts)
        images[kind] = pipeline.generate(prompts, progress=True, **sampling)
        tables[kind] = judge.grade_images(images[kind], scenes[first:], unseen[first:])
    return images, tables


class Rewriter:
    """An LLM that says prompts in plain words, greedily: the rival, which needs it to generate."""
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
    base_images, base_tables = grade(base, data, samples, steps=steps)
    images, tables = grade(adapted, data, samples, steps=steps)
    rewriter = Rewriter(llm, base.device)
    _, rewritten = grade(base, data, samples, kinds=("narrative", "unheard"), rewrite=rewriter,
                         steps=steps)
    figures = {}
    rows = [["right, %", "base", "with the adapter", "+-", "LLM rewrites, base draws", "+-"]]
    for name in (*KINDS, *FIELDS):                               # the fields of narratives
        kind = name if name in KINDS else "narrative"
        field = name if name in FIELDS else "all"
        figures |= common.percent(f"base_{name}", base_tables[kind][field])
        figures |= common.percent(name, tables[kind][field])
        row = [f"{kind}, {field}", figures[f"base_{name}"], figures[name], figures[f"{name}_ci"]]
        rival = common.percent("", rewritten[kind][field]) if kind in rewritten else {}
        rows.append([*row, *(rival.values() or ("", ""))])
    figures |= common.percent("rewriting", rewritten["narrative"]["all"])
    figures |= common.percent("rewriting_unheard", rewritten["unheard"]["all"])
    common.print_table(rows, f"{folder}: {samples} held-out scenes, {steps} sampling steps")
    figures |= compare_plain(base, base_images, base_tables, adapted, images, tables, data)
    draw(base, base_images, images, data, folder, steps)
    return figures


def compare_plain(base, base_images, base_tables, adapted, images, tables, data):
    """What the adapter costs plain captions, and its size; prints the first."""
    figures = common.percent("plain_loss", base_tables["plain"]["all"] - tables["plain"]["all"])
    # max: an untrained base gets no caption right
    base_plain = 100 * max(0.01, float(np.mean(base_tables["plain"]["all"])))
    narrative = 100 * float(np.mean(tables["narrative"]["all"]))
    figures["narrative_share"] = 100 * narrative / base_plain
    adapter_size = sum(p.numel() for p in adapted.text_encoder.adapter.parameters())
    base_size = sum(p.numel() for p in base.model.parameters())
    figures["adapter_share"] = 100 * adapter_size / base_size
    clip = encoders.ClipScorer(base.cfg.clip, base.device)
    figures["distance_base"] = clip_distance(base_images["plain"], data, clip)
    figures["distance"] = clip_distance(images["plain"], data, clip)
    print(f"plain captions, image by image: {figures['plain_loss']:.1f} +- "
          f"{figures['plain_loss_ci']:.1f} points lost; CLIP distance to real images "
          f"{figures['distance']:.4f}, of the base {figures['distance_base']:.4f}")
    return figures


def draw(base, base_images, images, data, folder, steps):
    """A grid of eight narratives: the base, the adapter, the base with keyword prompts."""
    scenes, _, _ = judge.validation_scenes(data, 8)
    narratives = narrative_prompts(scenes)
    prompts = [keywords(scene) for scene in scenes]
    keyword_images = base.generate(prompts, steps=steps)
    grid = [base_images["narrative"][:8], images["narrative"][:8], keyword_images]
    path = folder / "samples" / "narratives.png"
    common.image_grid(np.concatenate(grid), [""] * 8 + narratives + prompts, path, columns=8,
                      titles=["base", "with the adapter", "base, keyword prompts"])
    print(f"narratives, drawn: {path}")
