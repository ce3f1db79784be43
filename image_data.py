"""Captioned images: MS-COCO and other folders, read as viewers show them, in batches.

    a folder -> read_items -> [(path, [captions], annotation), ...] -> CaptionedImages
             -> batches    -> images uint8 (B, 3, S, S), B captions
"""
import functools
import hashlib
import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
from common import UserError


class BrokenImage(UserError):
    """An image that is missing, cut off, or not one at all."""


@functools.cache
def say_once(text):
    print(text)


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# what undoes an EXIF Orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def as_seen(image):
    """An open image as viewers show it, in 8-bit RGB: turned, and on white where transparent."""
    image.load()
    # only the value: ImageOps.exif_transpose also rewrites the EXIF, which fails if it is damaged
    turn = TURNS.get(image.getexif().get(0x0112))
    if image.mode in ("F", "I"):                        # it is unknown which number is white
        raise ValueError("32-bit or floating-point grey (HDR): convert it to 8 bits")
    if image.mode.startswith("I;16"):                   # grey of 16 bits
        grey = np.array(image, np.int64)
        grey[grey == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        worker = torch.utils.data.get_worker_info()
        if worker is None or worker.id == 0:
            say_once("\ntransparent images are put on a white background")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("RGB")
    return image.transpose(turn) if turn is not None else image


def load_image(path, size):
    """Reads an image as (size, size, 3) uint8: its largest centred square. Raises BrokenImage."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))            # a JPEG is decoded at 1/2, 1/4 or 1/8
            image = as_seen(image)
    except Exception as error:                          # decoders raise nearly anything
        raise BrokenImage(f"{path} cannot be read as an image ({common.say_why(error)})") from None
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    square = (left, top, left + side, top + side)
    # reducing_gap: very large images are first reduced to 3 x size by a faster filter
    image = image.resize((size, size), Image.Resampling.LANCZOS, square, reducing_gap=3.0)
    return np.array(image)


def normal(path):
    """A path as text that does not depend on its spelling: absolute, in composed characters."""
    return unicodedata.normalize("NFC", os.path.abspath(path))


def find_files(root):
    """{`normal` path: path} of the files below a folder, in order; linked folders are followed.

    Hidden ones are skipped, such as .thumbnails/, ._a.jpg, @eaDir/ (NAS) and __MACOSX/ (archives).
    """
    files = {}
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:                                # links can lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "@", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(folder, name)
                files[normal(path)] = path
    return files


def find_image(files, name, *folders):
    """The one of `files` that a data set calls `name`, as seen from one of `folders`, or None."""
    for folder in folders:
        for spelled in (name, name.replace("\\", "/")):         # Windows writes a\b.jpg
            if path := files.get(normal(folder / spelled)):
                return path
    return Path(name) if os.path.isabs(name) and os.path.isfile(name) else None


def one_line(text):
    """A caption without line breaks; raises ValueError for half characters, as in "\\ud800"."""
    text.encode()
    return " ".join(text.split())


class Captions:
    """The items of a data set, [(path, [captions], annotation), ...], and what is left out of it.

    annotation: a dict with "file_name"; left_out: {reason: [names]}.
    """
    def __init__(self):
        self.items = []
        self.left_out = {}

    def add(self, path, captions, annotation):
        captions = [caption for caption in map(one_line, captions) if caption]
        name = annotation["file_name"]
        if path is None:
            self.leave_out("not in their folder", name)
        elif not captions:
            self.leave_out("without a caption", name)
        else:
            self.items.append((path, captions, annotation))

    def leave_out(self, reason, name):
        self.left_out.setdefault(reason, []).append(name)

    def describe(self):
        parts = [f"{len(names):,} {reason} ({names[0]})" for reason, names in self.left_out.items()]
        return "; left out: " + ", ".join(parts) if parts else ""


def read_coco(root, split):
    """One split of COCO captions, as `Captions`."""
    found = sorted((root / "annotations").glob(f"captions_{split}20??.json"))
    if not found:
        raise UserError(f"no captions_{split}2017.json or captions_{split}2014.json in "
                        f"{root}/annotations/")
    folders = {path: root / path.stem.removeprefix("captions_") for path in found}
    with_images = [path for path in found if folders[path].is_dir()]
    annotations = (with_images or found)[-1]            # 2017 goes before 2014
    folder = folders[annotations]
    content = common.read_json(annotations)
    files = find_files(folder)
    data = Captions()
    with common.reading(annotations, "expected a captions_*.json of COCO, not instances_*.json"):
        captions = {}
        for annotation in content["annotations"]:
            own = captions.setdefault(str(annotation["image_id"]), [])
            own.append(annotation["caption"] or "")     # some are null
        for image in content["images"]:
            path = find_image(files, image["file_name"], folder, root)
            data.add(path, captions.get(str(image["id"]), []), image)
    if not data.items and "not in their folder" in data.left_out:
        raise UserError(f"the images of {annotations} are not in {folder}/{data.describe()}: "
                        f"unpack {folder.name}.zip there")
    return data


def read_folder(folder, files):
    """Images with a .txt file next to each, one caption per line, as `Captions`."""
    data = Captions()
    texts = {}
    images = {}
    for name, path in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            images[name] = path
        elif suffix.lower() == ".txt":
            texts[stem] = path
        else:
            data.leave_out(suffix or "with no extension", path.name)
    for name, path in images.items():
        text = texts.get(os.path.splitext(name)[0])
        captions = common.read_text(text).splitlines() if text else []
        data.add(path, captions, {"file_name": path.relative_to(folder).as_posix()})
    for stem in sorted(texts.keys() - {os.path.splitext(name)[0] for name in images}):
        data.leave_out(".txt with no image", texts[stem].name)
    return data


def read_metadata(lists, files):
    """Images named in metadata.jsonl, {"file_name": ..., "text": ...} per line (Hugging Face).

    lists: the paths of such files. "caption" may replace "text", and a list one caption.
    """
    data = Captions()
    for path in lists:
        for line in common.read_json_lines(path, path, ("file_name",)):
            name = line["file_name"]
            hint = 'expected "text": a caption, or a list of captions'
            with common.reading(f"{path}, {name}", hint):
                text = line["text"] if "text" in line else line["caption"]
                captions = text if isinstance(text, list) else [text]
                captions = [caption or "" for caption in captions]          # some are null
                data.add(find_image(files, name, path.parent), captions, line)
    return data


def train_val_split(items, split):
    """For data without splits: about one item in twenty for "val", the others for "train".

    A hash of the file's name decides, so adding a file moves no other. If it chooses none for
    "val", the one with the lowest hash is taken.
    """
    numbers = []
    for _, _, annotation in items:
        name = unicodedata.normalize("NFC", annotation["file_name"])
        digest = hashlib.sha256(os.fsencode(name)).digest()
        numbers.append(int.from_bytes(digest[:4], "big") / 2**32)
    limit = max(0.05, min(numbers, default=0))
    return [item for item, number in zip(items, numbers) if (number <= limit) == (split == "val")]


def read_items(root, split):
    """One split of a folder in any of the layouts, as `Captions`."""
    if not root.is_dir():
        raise UserError(f"--data {root}: there is no such folder")
    if (root / "annotations").is_dir():
        return read_coco(root, split)
    val = [root / name for name in ("validation", "valid", "val", "test") if (root / name).is_dir()]
    has_splits = (root / "train").is_dir() and bool(val)
    if split not in ("train", "val"):
        raise UserError(f"{root} has no split {split}, only train and val")
    folder = root
    if has_splits:
        folder = val[0] if split == "val" else root / "train"
    files = find_files(folder)
    lists = [path for path in files.values() if path.name == "metadata.jsonl"]
    data = read_metadata(lists, files) if lists else read_folder(folder, files)
    if not has_splits:
        data.items = train_val_split(data.items, split)
    return data


class CaptionedImages(torch.utils.data.Dataset):
    """Images and captions of a folder: MS-COCO, .txt files, or a metadata.jsonl.

    split: "train" or "val"; size: side of the square images in pixels; items: a list like
    `self.items` to use instead of what the folder holds, such as a part of it.
    `self[i, seed]` -> (image uint8 (3, S, S), one of its captions, ""). The same (i, seed) always
    gives the same result. A broken image is replaced by another one, and "" by the reason.
    """
    def __init__(self, root, split, size, items=None):
        if items is None:
            data = read_items(Path(root), split)
            items = data.items
            if not items:
                raise UserError(
                    f"--data {root}: no image with a caption for the {split} split"
                    f"{data.describe()}; expected MS-COCO with annotations/, or a.txt next to "
                    "a.jpg (not a.jpg.txt or a.caption), or metadata.jsonl (not .csv) with lines "
                    '{"file_name": "a.jpg", "text": ...}')
            say_once(f"{root}: {len(items):,} images for {split}{data.describe()}")
        self.items = items                              # [(path, [captions], annotation), ...]
        self.size = size
        # small images are decoded once and kept; larger sets are read by worker processes
        self.in_memory = len(items) * 3 * size**2 <= 256e6
        self.cache = {}

    def __len__(self):
        return len(self.items)

    def identity(self):
        """A hash of names and captions: moved data are the same data."""
        content = [(path.name, captions) for path, captions, _ in self.items]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def image(self, i):
        """uint8 (3, S, S); raises BrokenImage."""
        if i in self.cache:
            return self.cache[i]
        image = torch.from_numpy(load_image(self.items[i][0], self.size)).permute(2, 0, 1)
        if self.in_memory:
            self.cache[i] = image
        return image

    def __getitem__(self, index_and_seed):
        i, seed = index_and_seed
        rng = random.Random(seed)
        broken = ""
        for _ in range(20):
            try:
                return self.image(i), rng.choice(self.items[i][1]), broken
            except BrokenImage as error:
                broken = str(error)
                i = rng.randrange(len(self))
        raise UserError(f"twenty images in a row could not be read; the last one: {broken}")


class ResumableBatchSampler:
    """The batches of steps start + 1 to stop: lists of (index, seed) for `CaptionedImages`.

    Step n depends on `seed` and n alone, so a resumed run sees what it would have seen.
    Every image comes once per epoch, in a new order each time. With several processes
    (`world_size`) each gets its share of every batch.
    """
    def __init__(self, length, batch_size, start, stop, seed, rank=0, world_size=1):
        self.length = length
        self.batch_size = batch_size
        self.steps = range(start, stop)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __iter__(self):
        share = self.batch_size // self.world_size
        epoch = -1                                      # a new one can begin mid-batch
        for step in self.steps:
            first = step * self.batch_size + self.rank * share
            batch = []
            for position in range(first, first + share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    generator = torch.Generator().manual_seed(self.seed * 9973 + epoch)
                    order = torch.randperm(self.length, generator=generator).tolist()
                batch.append((order[position % self.length], self.seed * 10**12 + position))
            yield batch


def collate(items):
    """Leaves captions, which may be pairs, as they are; the default would transpose them."""
    images, captions, broken = zip(*items)
    return torch.stack(images).numpy(), list(captions), list(broken)


def load_batches(dataset, lists, workers=None, world_size=1):
    """(images, captions, what is broken) for each of the lists of (index, seed).

    workers: processes that read images; by default none for small images, else up to 8. They send
    arrays through pipes: tensors would go through /dev/shm, which is too small in many containers.
    """
    if workers is None:
        cores = (os.cpu_count() or 1) // world_size
        workers = 0 if dataset.in_memory else min(8, max(1, cores))
    if not 0 <= workers <= 256:
        raise UserError(f"--workers {workers}: expected 0 to 256")
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=lists, collate_fn=collate, num_workers=workers)
    for images, captions, broken in loader:
        yield torch.from_numpy(images), captions, broken


def load_all(dataset, batch_size, title, workers=None):
    """`load_batches` of all images in order, with a progress bar."""
    order = [(i, i) for i in range(len(dataset))]
    lists = [order[first:first + batch_size] for first in range(0, len(order), batch_size)]
    return tqdm(load_batches(dataset, lists, workers), title, len(lists))


def batches(dataset, batch_size, start, stop, seed, workers=None, rank=0, world_size=1):
    """Yields (images uint8 (B, 3, S, S), B captions) for steps start + 1 to stop."""
    sampler = ResumableBatchSampler(len(dataset), batch_size, start, stop, seed, rank, world_size)
    broken = set()
    for images, captions, reasons in load_batches(dataset, sampler, workers, world_size):
        reasons = set(filter(None, reasons))
        if reasons and not broken:
            print(f"\nwarning: {min(reasons)}; another image takes its place")
        broken |= reasons
        if len(broken) > 0.01 * len(dataset):
            raise UserError(f"{len(broken)} of {len(dataset):,} images cannot be read, more than "
                            f"1 % (such as {min(broken)}): fix or remove them")
        yield images, captions
    if broken:
        print(f"{len(broken)} images could not be read and were replaced")


def to_float(images):
    """uint8 [0, 255] -> float [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] (B, 3, H, W) -> numpy uint8 (B, H, W, 3)."""
    if not x.isfinite().all():                          # they would be drawn black
        raise UserError("the network gives nan, not images: its weights are damaged, or too large "
                        "for this precision: try --precision fp32")
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
