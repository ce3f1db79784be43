"""How well prompts in four languages and of any length are understood on the toy world.

`base` is the pipeline of a run of `uvit_fusion`. In `adapted` and those of `after_stage` an LLM
with an adapter of `llm_adapter` replaces its text encoder.
"""
import random
from pathlib import Path

import common
import encoders
from toy import judge, models
from toy.language import LANGUAGES, paragraph, tell


def validation_prompts(scenes, captions):
    """{kind: a prompt for each scene}, the same for every run; captions: the English ones.

    The kinds are the LANGUAGES; "long", an English paragraph; "turns", the languages taking turns.
    """
    prompts = {"english": captions}
    for language in LANGUAGES[1:]:
        prompts[language] = [tell(scene, language, random.Random(i))
                             for i, scene in enumerate(scenes)]
    prompts["long"] = [paragraph(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    prompts["turns"] = [prompts[LANGUAGES[i % 4]][i] for i in range(len(scenes))]
    return prompts


def grade(pipeline, kind, data, samples, steps):
    """Generates held-out scenes from one kind of prompt, with the same noise for every kind.

    Returns the images, uint8 (N, H, W, 3), and which are all right, float (N,) of 0 and 1.
    """
    scenes, captions, unseen = judge.validation_scenes(data, samples)
    prompts = validation_prompts(scenes, captions)[kind]
    images = pipeline.generate(prompts, steps=steps, progress=True)
    return images, judge.grade_images(images, scenes, unseen)["all"]


def report(base, after_stage, data, folder, args):
    """Prints what the LLM understands, draws two grids, and returns the figures (in %).

    after_stage: {n: pipeline with the weights of stage n}; args: samples, sample_steps, and a
    loaded font.
    """
    adapted = after_stage[max(after_stage)]
    figures = {}
    rows = [["all right, %", "own text encoder", "with the LLM", "+-"]]
    for kind in (*LANGUAGES, "long"):
        _, right_by_clip = grade(base, kind, data, args.samples, args.sample_steps)
        _, right_by_llm = grade(adapted, kind, data, args.samples, args.sample_steps)
        figures |= common.percent(f"clip_{kind}", right_by_clip)
        figures |= common.percent(kind, right_by_llm)
        rows.append([kind, figures[f"clip_{kind}"], figures[kind], figures[f"{kind}_ci"]])
    figures["english_gap"] = figures["clip_english"] - figures["english"]
    for language in LANGUAGES[1:]:
        figures[f"{language}_gap"] = figures["english"] - figures[language]

    images = {}
    right = {}
    for n, pipeline in after_stage.items():
        images[n], right[n] = grade(pipeline, "turns", data, args.samples, args.sample_steps)
        figures |= common.percent(f"stage{n}", right[n])
        rows.append([f"four languages, after stage {n}", "", figures[f"stage{n}"],
                     figures[f"stage{n}_ci"]])
    common.print_table(rows, f"{folder}: {args.samples} held-out scenes, {args.sample_steps} "
                       "sampling steps")
    if 3 in after_stage and Path(base.cfg.clip) == models.CLIP_FOLDER:   # the scorer is built on it
        clip = encoders.ClipScorer(base.cfg.clip, base.device)
        scorer = encoders.AestheticScorer(models.SCORER, clip)
        figures["quality_before"] = float(scorer(images[2]).mean())
        figures["quality_after"] = float(scorer(images[3]).mean())
        figures |= common.percent("stage3_loss", right[2] - right[3])
        print(f"stage 3: mean quality from {figures['quality_before']:.3f} to "
              f"{figures['quality_after']:.3f}; right images lost, pair by pair: "
              f"{figures['stage3_loss']:.1f} +- {figures['stage3_loss_ci']:.1f} points")
    draw(base, adapted, data, folder, args.font)
    return figures


def draw(base, adapted, data, folder, font):
    """Draws samples/languages.png and samples/long.png: the same prompts and noise for both."""
    scenes, captions, _ = judge.validation_scenes(data, 6)
    prompts = validation_prompts(scenes, captions)
    labels = ["own text encoder", "with the LLM"]
    images = []
    texts = []
    titles = []
    for language in LANGUAGES:                                   # two rows of six images
        for label, pipeline in zip(labels, (base, adapted)):
            images += list(pipeline.generate(prompts[language]))
            titles.append(f"{language}, {label}")
        texts += [""] * 6 + prompts[language]
    languages_path = folder / "samples" / "languages.png"
    common.image_grid(images, texts, languages_path, columns=6, titles=titles, font=font)
    long = prompts["long"][:4]
    images = []
    for pair in zip(base.generate(long), adapted.generate(long)):        # a row
        images += pair
    long_path = folder / "samples" / "long.png"
    common.image_grid(images, labels * 4, long_path, columns=2, titles=long, font=font)
    print(f"prompts in four languages and long ones, drawn: {languages_path}, {long_path}")
