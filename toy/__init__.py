"""The toy world: captioned shapes and small experts, in the formats of the real data and models, built on first need."""
from pathlib import Path


def prepare(data, clip, size=24, llm="", captioner="", segmenter=""):
    """Builds what the toy world lacks for these settings; returns the folder of the data.

    data: "shapes", or the folder of other data, which is returned as it is; clip: the text encoder; size: pixels of the scenes; llm: the
    language model, if there is one: then the toy world's pairs of sentences, narratives, pictures of differing quality and their scorer are
    built too; captioner, segmenter: what reads pictures, if anything does.
    """
    from toy import experts, shapes, tellings
    known = data == "shapes"
    folder = shapes.build("data/shapes" if size == 24 else f"data/shapes{size}", size) if known else data
    if Path(clip) == experts.CLIP_FOLDER:
        if not known:
            print(f"warning: the tiny CLIP in {clip} knows captions of coloured shapes only; for {data} name a real one: "
                  "--clip openai/clip-vit-large-patch14")
        experts.clip(shapes.build())
    for path, own, build in ((llm, experts.LLM_FOLDER, experts.llm), (captioner, experts.CAPTIONER_FOLDER, experts.captioner),
                             (segmenter, experts.SEGMENTER_FOLDER, experts.segmenter)):
        if Path(path) == own:
            build(shapes.build())
    if known and llm:
        tellings.build_parallel(folder)
        tellings.build_narratives(folder)
        shapes.build_quality(folder, size)
        if Path(clip) == experts.CLIP_FOLDER:
            experts.scorer()
    return folder
