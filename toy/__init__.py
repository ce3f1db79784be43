"""The toy world: captioned shapes and small models, on disk in the formats of real ones."""
from pathlib import Path

from common import UserError
from toy import language, models, shapes

WORLDS = ("shapes", "simple")            # names for --data; all others are folders


def prepare(data, clip, size=24, llm="", captioner="", segmenter=""):
    """Builds what the toy world lacks for these settings; returns the folder of the data.

    data: "shapes"; "simple", fewer scenes, of one group; or the folder of other data, which is
    returned as it is. size: pixels of the images. clip, llm, captioner, segmenter: folders of
    models. The toy world's own models, which read 24 x 24 pixels, are trained if they are named
    here. With an LLM the toy world also gets parallel sentences, narratives, and images of
    varying quality; with an LLM and the tiny CLIP also a scorer for them.
    """
    if data not in WORLDS and not Path(data).is_dir():   # before minutes of building
        raise UserError(f"--data {data}: there is no such folder")
    folder = data
    if data == "shapes":
        folder = shapes.build("data/shapes" if size == 24 else f"data/shapes{size}", size)
    elif data == "simple":
        folder = shapes.build(f"data/simple{size}", size, train=6_000, val=1_024, simple=True)
    has_tiny_clip = Path(clip) == models.CLIP_FOLDER
    if has_tiny_clip and data not in WORLDS:
        print(f"warning: the tiny CLIP in {clip} knows only captions of coloured shapes; to train "
              f"with {data}, name a real one: --clip openai/clip-vit-large-patch14")
    own_models = {
        models.CLIP_FOLDER: models.clip,
        models.LLM_FOLDER: models.llm,
        models.INSTRUCTED_FOLDER: models.instructed_llm,
        models.CAPTIONER_FOLDER: models.captioner,
        models.SEGMENTER_FOLDER: models.segmenter,
    }
    for model in (clip, llm, captioner, segmenter):
        if Path(model) in own_models:
            train = own_models[Path(model)]
            train(shapes.build())
    if llm and data in WORLDS:
        language.build_parallel(folder)
        language.build_narratives(folder)
        shapes.build_quality(folder, size)
        if has_tiny_clip:
            models.scorer()
    return folder
