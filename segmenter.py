"""The parts of an image, and their names: any transformers segmenter, with or without SAM's masks.

    images uint8 (N, H, W, 3) -> Segmenter -> N lists of parts (label, mask (H, W) bool)

A semantic segmenter (SegFormer, ...) only labels pixels: each connected area of a label is a part.
A universal one (Mask2Former, OneFormer, EoMT: arXiv 2112.01527, 2211.06220, 2503.19108) also
separates things of the same kind. With `SamMasks`, Segment Anything (arXiv 2304.02643) finds
the parts, and the segmenter names them.
"""
import contextlib
import inspect

import numpy as np
import torch
import torch.nn.functional as F

import encoders
from toy import judge


# ------------------------------------------------------------------------------- Segment Anything
def stability(logits, offset=1.0):
    """IoU of the masks at thresholds `offset` above and below 0: logits (M, h, w) -> (M,)."""
    smaller = (logits > offset).sum((1, 2))
    larger = (logits > -offset).sum((1, 2))
    return smaller / larger.clamp(min=1)


def suppress(masks, scores, most=0.7):
    """Non-maximum suppression of masks (M, h, w) bool: indices of those kept, the best first.

    Of two masks whose IoU (intersection over union) is above `most`, the lower-scoring one goes.
    """
    flat = masks.flatten(1).float()
    area = flat.sum(1)
    rest = scores.argsort(descending=True)
    kept = []
    while len(rest):
        best = rest[0]
        kept.append(best)
        rest = rest[1:]
        common_area = (flat @ flat[best])[rest]
        iou = common_area / (area[rest] + area[best] - common_area)
        rest = rest[iou <= most]
    return torch.stack(kept) if kept else rest


class SamMasks:
    """All that Segment Anything finds in a square image uint8 (H, H, 3): masks (M, H, H) bool.

    For each point of a grid it proposes three masks. Those that it rates low, or that are not
    stable, are dropped at its own resolution of 256 x 256, on the device. The transformers pipeline
    first enlarges all to 1024 x 1024, which takes gigabytes and many seconds.
    """
    POINTS = 32                                      # per side of the grid
    BATCH = 16                                       # points at a time: 64 took twice the memory
    PREDICTED_IOU = 0.88                             # of a mask that is kept, as published
    STABILITY = 0.95                                 # the same

    def __init__(self, path, device, dtype=torch.float32):
        self.model, self.processor = encoders.load_pretrained(
            "SamModel", path, "--sam", "Segment Anything model", device, "AutoImageProcessor",
            dtype=dtype, attn_implementation="sdpa")

    @torch.no_grad()
    def __call__(self, image):
        inputs = self.processor(images=image, return_tensors="pt")
        pixels = inputs.pixel_values.to(self.model.device, self.model.dtype)     # (1, 3, S, S)
        embeddings = self.model.get_image_embeddings(pixels)
        ticks = (torch.arange(self.POINTS, device=pixels.device) + 0.5) / self.POINTS
        grid = torch.cartesian_prod(ticks, ticks) * pixels.shape[-1]             # in pixels
        logits = []
        scores = []
        for points in grid.to(pixels.dtype).split(self.BATCH):
            found = self.model(image_embeddings=embeddings, input_points=points[None, :, None])
            masks = found.pred_masks[0].flatten(0, 1)                            # (3 B, h, w)
            iou = found.iou_scores[0].flatten()                                  # (3 B,) predicted
            good = (iou > self.PREDICTED_IOU) & (stability(masks) > self.STABILITY)
            logits.append(masks[good])
            scores.append(iou[good])
        logits = torch.cat(logits)
        kept = suppress(logits > 0, torch.cat(scores))
        if not len(kept):
            return np.zeros((0, *image.shape[:2]), bool)
        large = F.interpolate(logits[kept][None].float(), image.shape[:2], mode="bilinear")
        return (large[0] > 0).cpu().numpy()


# ----------------------------------------------------------------------- semantic and universal
def is_universal(path):
    """True for Mask2Former, OneFormer, EoMT, ..., which from then on load without scipy."""
    import transformers  # takes seconds, and --help needs none of it
    with contextlib.suppress(OSError, ValueError):   # `load_pretrained` says what is wrong
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        universal = transformers.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING
        if type(config) in universal:
            # they ask for scipy because of their training loss, which is never used here
            inspect.getmodule(universal[type(config)]).requires_backends = lambda *names: None
            return True
    return False


def name_masks(masks, areas):
    """[(class, mask), ...]: for each of the masks (M, H, W) its most frequent class.

    areas: [(class, mask), ...] of the segmenter. A mask that lies mostly outside them is left out.
    """
    labels = np.zeros(masks.shape[1:], int)          # class i as i + 1, and 0 for none
    for i, area in areas:
        labels[area] = i + 1
    most = [np.bincount(labels[mask], minlength=1).argmax() for mask in masks]
    return [(label - 1, mask) for label, mask in zip(most, masks) if label]


class Segmenter:
    """Images uint8 (N, H, W, 3) -> N lists of parts (label, mask (H, W) bool).

    sam: a Segment Anything model (in `dtype`) that finds the parts, which the segmenter then names.
    `labels`: all names of parts.
    """
    SURE = 0.8                                       # of the class of a segment, as published
    SMALLEST = 0.012                                 # a part's share of the image

    def __init__(self, path, device, sam="", dtype=torch.float32):
        kind = "AutoModelForSemanticSegmentation"
        processor = "AutoImageProcessor"
        self.universal = is_universal(path)
        if self.universal:
            kind = "AutoModelForUniversalSegmentation"
            processor = "AutoProcessor"              # OneFormer's reads the name of the task, too
        self.model, self.processor = encoders.load_pretrained(
            kind, path, "--segmenter", "segmenter", device, processor)
        self.names = {}
        for i, name in self.model.config.id2label.items():
            if name != "background":                 # COCO has "sky-other-merged"
                self.names[i] = name.removesuffix("-merged").removesuffix("-other")
        self.labels = list(self.names.values())
        self.sam = SamMasks(sam, device, dtype) if sam else None

    @torch.no_grad()
    def __call__(self, images):
        find = self.segments if self.universal else self.connected_areas
        found = []
        for image, areas in zip(images, find(images)):
            areas = [(i, mask) for i, mask in areas if i in self.names]
            if self.sam:
                areas = name_masks(self.sam(image), areas)
            found.append([(self.names[i], mask) for i, mask in areas
                          if mask.mean() >= self.SMALLEST])
        return found

    def connected_areas(self, images):
        """N lists of (class, mask), from the class of each pixel."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        maps = self.processor.post_process_semantic_segmentation(
            self.model(**inputs), [images.shape[1:3]] * len(images))
        classes = torch.stack(maps).cpu().numpy()                                    # (N, H, W)
        areas = []
        for labels, parts in zip(classes, judge.components(classes + 1)):
            numbers, first = np.unique(parts, return_index=True)
            areas.append([(labels.flat[i], parts == k) for k, i in zip(numbers, first)])
        return areas

    def segments(self, images):
        """N lists of (class, mask), as the papers read the queries of their models.

        Each pixel goes to at most one of the queries that are sure of their class. A query that
        loses a fifth of its mask to others is dropped. The post-processing in transformers would
        also assign the pixels that are in no query's mask.
        """
        task = {}
        if self.model.config.model_type == "oneformer":
            task = {"task_inputs": ["panoptic"] * len(images)}
        inputs = self.processor(images=list(images), return_tensors="pt", **task)
        output = self.model(**inputs.to(self.model.device))
        probabilities = output.class_queries_logits.softmax(-1)         # (N, Q, classes + 1)
        found = []
        for p, logits in zip(probabilities, output.masks_queries_logits):
            score, label = p.max(-1)                                                # (Q,)
            sure = (score > self.SURE) & (label < p.shape[1] - 1)                   # last: nothing
            logits = F.interpolate(logits[None], images.shape[1:3], mode="bilinear")[0]
            masks = logits.sigmoid()[sure]                                          # (M, H, W)
            weighted = score[sure][:, None, None] * masks
            areas = []
            for i, mask, own in zip(label[sure].tolist(), masks > 0.5, weighted):
                visible = mask & (own == weighted.amax(0))
                if visible.sum() > 0.8 * mask.sum():
                    areas.append((i, visible.cpu().numpy()))
            found.append(areas)
        return found
