"""What a training run reports: ten times along the way, and at its end.

Images for captions of the validation split, and on the toy world the judge's verdict on others.
"""
import itertools
import math
import time
from pathlib import Path

import common
from image_data import CaptionedImages
from toy import judge


def validation_captions(dataset, count):
    """A caption of each of the first images, not always the first wording."""
    return [texts[i % len(texts)] for i, (_, texts, _) in enumerate(dataset.items[:count])]


class Validation:
    """Measures a training run ten times; pipeline: the one with the EMA weights.

    The loss, and images: samples/step_<n>.png. On the toy world also the share right, of the last
    `samples` scenes; `report` grades the first. `curve`: (seconds of training, % right).
    """
    def __init__(self, pipeline, data, folder, samples):
        self.pipeline = pipeline
        self.data = data
        self.folder = Path(folder)
        self.every = max(1, pipeline.cfg.steps // 10)
        items = CaptionedImages(data, "val", pipeline.image_size).items
        # few enough to be decoded once and kept, up to 577 x 577 pixels
        self.dataset = CaptionedImages(data, "val", pipeline.image_size, items[:256])
        self.samples = samples if "scene" in items[0][2] else 0
        self.first = max(0, len(items) - samples)
        self.curve = [(0.0, 0.0)]

    def start_clock(self):
        self.started = time.perf_counter()

    def at(self, step):
        """{"validation": loss, "right": share} for metrics.csv, None where none is due.

        Without "right" if no scenes are graded.
        """
        figures = {"validation": None, "right": None} if self.samples else {"validation": None}
        if step % self.every:
            return figures
        common.synchronize(self.pipeline.device)
        seconds = self.curve[-1][0] + time.perf_counter() - self.started
        captions = validation_captions(self.dataset, 16)
        path = self.folder / "samples" / f"step_{step}.png"
        common.image_grid(self.pipeline.generate(captions), captions, path, columns=8)
        figures["validation"] = self.pipeline.loss(self.dataset)
        right = math.nan
        if self.samples:
            graded, _ = judge.accuracy(self.pipeline, self.data, self.samples, self.first)
            right = graded["all"]
            figures["right"] = right / 100
        self.curve.append((seconds, right))
        self.start_clock()                               # validations do not count
        return figures

    def report_speed(self):
        """Prints and writes to results.json the ms a step, and when 80 % were right."""
        # without the first tenth, in which captions are encoded, images decoded, networks compiled
        steps = self.every * (len(self.curve) - 2)
        if not steps:                                    # a single validation
            return
        ms = 1e3 * (self.curve[-1][0] - self.curve[1][0]) / steps
        images = 1e3 * self.pipeline.cfg.batch_size / ms
        figures = {"step_ms": ms}
        print(f"{ms:.1f} ms a step, {images:.0f} images a second")
        seconds = time_until(self.curve, 80)
        if not math.isnan(seconds):
            figures["seconds_to_80"] = seconds
            print(f"{seconds:.0f} s of training until 80 % of {self.samples} held-out captions "
                  "were right")
        common.write_results(self.folder, figures)


def time_until(curve, right):
    """When a curve [(time, % right), ...] first reaches `right` %, interpolated; nan if never."""
    for (time_below, below), (time_above, above) in itertools.pairwise(curve):
        if below < right <= above:
            return time_below + (right - below) / (above - below) * (time_above - time_below)
    return math.nan


def report(pipeline, data, folder, samples, begin):
    """Ends a training run: generates images for captions and, on the toy world, grades `samples`.

    Writes samples/validation.png and results.json. begin: time.time() at the start.
    """
    folder = Path(folder)
    dataset = CaptionedImages(data, "val", pipeline.image_size)
    captions = validation_captions(dataset, 24)
    path = folder / "samples" / "validation.png"
    common.image_grid(pipeline.generate(captions), captions, path)
    print(f"captions of the validation split, drawn: {path}")
    figures = {}
    if "scene" in dataset.items[0][2]:                   # the toy world
        figures, table = judge.accuracy(pipeline, data, samples)
        cfg = pipeline.cfg
        judge.print_accuracy(figures, table, f"{folder}: {figures['samples']} held-out captions, "
                             f"25 steps of {cfg.sampler}, guidance {cfg.guidance:g}")
    common.finish(folder, figures, begin)
