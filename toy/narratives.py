"""How well narrative prompts are understood on the toy world, and whether plain captions still are.

`pipeline` is that of `uvit_fusion`; `base` and `adapted` are without and with an adapter of
`sur_adapter`.
"""
import numpy as np

import common
from toy import judge
from toy.gain import clip_distance
from toy.language import narrative_prompts
from toy.shapes import FIELDS, keywords


def grade(pipeline, data, samples, **sampling):
    """Generates held-out scenes from plain captions and from narratives, with the same noise.

    Returns two dicts with the keys "plain" and "narrative": images (N, H, W, 3), and their tables
    by `judge.grade_images`. sampling: more for `pipeline.generate`.
    """
    scenes, captions, unseen = judge.validation_scenes(data, samples)
    images = {}
    tables = {}
    for kind, prompts in (("plain", captions), ("narrative", narrative_prompts(scenes))):
        images[kind] = pipeline.generate(prompts, progress=True, **sampling)
        tables[kind] = judge.grade_images(images[kind], scenes, unseen)
    return images, tables


def report(base, adapted, data, folder, samples, steps):
    """Prints a table, draws samples/narratives.png, returns the figures of results.json."""
    base_images, base_tables = grade(base, data, samples, steps=steps)
    images, tables = grade(adapted, data, samples, steps=steps)
    figures = {}
    rows = [["right, %", "base", "with the adapter", "+-"]]
    for name in ("plain", "narrative", *FIELDS):                 # the fields of narratives
        kind = "plain" if name == "plain" else "narrative"
        field = name if name in FIELDS else "all"
        figures |= common.percent(f"base_{name}", base_tables[kind][field])
        figures |= common.percent(name, tables[kind][field])
        rows.append([f"{kind}, {field}", figures[f"base_{name}"], figures[name],
                     figures[f"{name}_ci"]])
    common.print_table(rows, f"{folder}: {samples} held-out scenes, {steps} sampling steps")

    figures |= common.percent("plain_loss", base_tables["plain"]["all"] - tables["plain"]["all"])
    # max: an untrained base gets no caption right
    figures["narrative_share"] = 100 * figures["narrative"] / max(1, figures["base_plain"])
    adapter_size = sum(p.numel() for p in adapted.text_encoder.adapter.parameters())
    base_size = sum(p.numel() for p in base.model.parameters())
    figures["adapter_share"] = 100 * adapter_size / base_size
    clip = common.ClipScorer(base.cfg.clip, base.device)
    figures["distance_base"] = clip_distance(base_images["plain"], data, clip)
    figures["distance"] = clip_distance(images["plain"], data, clip)
    print(f"plain captions, image by image: {figures['plain_loss']:.1f} +- "
          f"{figures['plain_loss_ci']:.1f} points lost; CLIP distance to real images "
          f"{figures['distance']:.4f}, of the base {figures['distance_base']:.4f}")

    scenes, _, _ = judge.validation_scenes(data, 8)
    narratives = narrative_prompts(scenes)
    prompts = [keywords(scene) for scene in scenes]
    keyword_images = base.generate(prompts, steps=steps)
    grid = [base_images["narrative"][:8], images["narrative"][:8], keyword_images]
    path = folder / "samples" / "narratives.png"
    common.image_grid(np.concatenate(grid), [""] * 8 + narratives + prompts, path, columns=8,
                      titles=["base", "with the adapter", "base, keyword prompts"])
    print(f"narratives, drawn: {path}")
    return figures
