"""What the five methods share: captioned pictures and a frozen text encoder in, a run folder out.

    pictures on disk -> CaptionedImages -> batches of (pictures uint8 (B, 3, S, S), B captions, paths of broken pictures)
    captions         -> TextEncoder     -> features (B, L, D), mask (B, L)
    a training                          -> runs/<name>/{config.json, model.safetensors, state.pt, metrics.csv, loss.png, results.json, samples/}

Nothing here knows a method. A user's slip raises `UserError`, which `entry` turns into one line and exit status 2.
"""
import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from tqdm import tqdm

DATA_HELP = ("expected the layout of MS-COCO (annotations/captions_train2017.json beside train2017/; 2014 likewise), "
             "a folder of pictures with a .txt caption beside each, or one with a metadata.jsonl")


class UserError(Exception):
    """Something the user can put right; its text is one line that says what is wrong and what to do."""


def entry(main):
    """Runs a script's main(): a `UserError`, a file that cannot be written, or too little memory ends it with one line and status 2.

    Of several processes that train together only the first to fail speaks: the others fail because of it. Ctrl-C ends with status 130.
    """
    keep_memory()
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        reason = error
    except torch.OutOfMemoryError:
        reason = "the GPU has too little memory: a smaller --batch, or with --train --accumulate 2 (4, 8, ...) or --recompute, takes less"
    except RuntimeError as error:
        if not Ranks.store or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        reason = "another of the processes has ended, so this one ends too; the last checkpoint is whole: go on with --resume"
    with contextlib.suppress(RuntimeError):                                   # the store may be gone
        if Ranks.store and Ranks.store.add("failed", 1) > 1:
            sys.exit(2)
    print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(2)


def keep_memory():
    """On Linux, has the process keep what it frees: else every large array is fresh memory, which the kernel hands out zeroed, page by page.

    A training step at the paper's size, 32 pictures, took 4.3 s on two CPU cores, and 3.4 s with it. Elsewhere it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):                        # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)                                                        # M_MMAP_MAX: large blocks come from the heap too,
        mallopt(-1, -1)                                                       # M_TRIM_THRESHOLD: which never shrinks


class Ranks:
    """The processes that torchrun started to train together: this one is `rank` of `count`. Without torchrun it is 0 of 1.

    device: as the flag names it; each process gets a GPU of its own. Only rank 0 prints to standard output.
    """
    store = None

    def __init__(self, device="auto"):
        self.rank, self.count, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if self.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise UserError(f"torchrun --nproc_per_node asks for more processes than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(local)
            device = f"cuda:{local}"
        self.device = pick_device(device)
        if self.count > 1:
            Ranks.store, _, _ = next(torch.distributed.rendezvous("env://"))
            # the others wait while rank 0 prepares data, grades or encodes a data set, which may take hours
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=Ranks.store, rank=self.rank,
                                                 world_size=self.count, timeout=datetime.timedelta(hours=24))
            if self.rank:
                sys.stdout = open(os.devnull, "w")

    @contextlib.contextmanager
    def first(self):
        """What is inside is done by rank 0, then by the others, which find on disk what it left."""
        if self.rank:
            torch.distributed.barrier()
        yield
        if self.count > 1 and not self.rank:
            torch.distributed.barrier()

    def precision(self, name):
        """`pick_precision` by rank 0 alone: probing all at once, they could come to different answers."""
        fast = 0.0 if self.rank else float(pick_precision(name, self.device) == torch.bfloat16)
        return torch.bfloat16 if self.mean([fast])[0] > 0 else torch.float32

    def mean(self, values):
        """Means over the ranks of a list of numbers."""
        if self.count == 1:
            return values
        values = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(values)
        return (values / self.count).tolist()


# ------------------------------------------------------------------------------------------------------- captioned pictures
def load_picture(path, size):
    """Reads a picture as (size, size, 3) uint8: its largest centred square, resized with the Lanczos filter.

    Draft mode lets the JPEG decoder work at 1/2, 1/4 or 1/8 of the size, whichever still holds `size` pixels. PyTorch resizes in less than half
    of Pillow's time, to values that differ by 1 at most. Raises OSError (or another of BROKEN) for a file that is missing, cut off or no picture.
    """
    with Image.open(path) as image:
        image.draft("RGB", (size, size))
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = torch.from_numpy(pixels[top:top + side, left:left + side].copy())                      # a copy, since Pillow's memory is read-only
    if side == size:
        return square.numpy()
    return F.interpolate(square.permute(2, 0, 1)[None], (size, size), mode="lanczos", antialias=True)[0].permute(1, 2, 0).numpy()


BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not whole JSON ({error}): copy or unpack it again") from None


def read_json_lines(path, named, fields):
    """The objects of a file with one a line, each of which has these fields, strings. named: what a UserError for another file begins with."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")     # splitlines() also cuts at marks that JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{named} cannot be read ({error})") from None
    objects = []
    for n, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
            if not all(isinstance(objects[-1][field], str) for field in fields):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            expected = ", ".join(f'"{field}": ...' for field in fields)
            raise UserError(f"{named}, line {n}: expected {{{expected}}}, found {line[:60]!r}") from None
    return objects


def read_coco(root, split):
    """COCO captions of one split: a list of (picture path, [captions], entry of the image in the annotations)."""
    for year in ("2017", "2014"):
        notes, folder = root / "annotations" / f"captions_{split}{year}.json", root / f"{split}{year}"
        if notes.exists():
            break
    else:
        raise UserError(f"{root}/annotations has no captions_{split}2017.json and no captions_{split}2014.json; {DATA_HELP}")
    if not folder.is_dir():
        raise UserError(f"{notes} is there but its pictures, {folder}/, are not: unpack {folder.name}.zip beside annotations/")
    content = read_json(notes)
    try:
        told = {}
        for note in content["annotations"]:
            if text := " ".join(note["caption"].split()):           # some captions of COCO have line breaks, some are blank
                told.setdefault(note["image_id"], []).append(text)
        there = {item.name for item in os.scandir(folder)}
        listed = [image for image in content["images"] if image["id"] in told]
        items = [(folder / image["file_name"], told[image["id"]], image) for image in listed if image["file_name"] in there]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{notes} is not a COCO captions file (no {error}): use captions_*.json, not instances_*.json") from None
    missing = [image["file_name"] for image in listed if image["file_name"] not in there]
    if len(missing) > 0.01 * len(listed):
        raise UserError(f"{len(missing):,} of {len(listed):,} pictures of {notes} are not in {folder}/ (first: {missing[0]}): "
                        f"unpack {folder.name}.zip there")
    if missing:
        print(f"warning: {len(missing)} pictures of {notes.name} are not in {folder}/ and are left out (first: {missing[0]})")
    return items


def read_folder(root, split):
    """Pictures with a .txt caption (one a line) beside each; see `twentieth`."""
    pairs = [(path, path.with_suffix(".txt")) for path in sorted(root.rglob("*")) if path.suffix.lower() in PICTURES]
    pairs = twentieth([(path, text) for path, text in pairs if text.exists()], split)
    items = []
    for path, text in pairs:
        lines = [line.strip() for line in text.read_text(encoding="utf-8", errors="replace").splitlines()]
        items.append((path, [line for line in lines if line], {"file_name": path.name}))
    return [item for item in items if item[1]]


def read_metadata(root, split):
    """Pictures named in metadata.jsonl, a line each with "file_name" and "text", as in an imagefolder of Hugging Face; splits as above."""
    notes = read_json_lines(root / "metadata.jsonl", root / "metadata.jsonl", ("file_name", "text"))
    return twentieth([(root / note["file_name"], [" ".join(note["text"].split())], note) for note in notes], split)


def twentieth(items, split):
    """Of data without splits: every twentieth item, and at least one, for "val", the others for "train"."""
    return [item for i, item in enumerate(items) if (i % 20 == 0) == (split == "val")]


class CaptionedImages(torch.utils.data.Dataset):
    """Pictures and captions of a folder: COCO 2014 or 2017, pictures with a .txt beside each, or pictures with one metadata.jsonl.

    root: the folder; split: "train" or "val"; size: pixels of the square pictures.
    `self[i, draw]` -> (picture uint8 (3, S, S), one of its captions, paths of broken pictures). `draw` is an integer that decides which
    caption; the same pair always gives the same item, in whichever process. A broken picture is replaced by another, drawn with `draw`.
    Raises UserError for a folder that is not as described, and when no picture is left.
    """
    def __init__(self, root, split, size):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"--data {root}: there is no such folder; {DATA_HELP}")
        read = read_coco if (root / "annotations").is_dir() else read_metadata if (root / "metadata.jsonl").exists() else read_folder
        self.items = read(root, split)
        if not self.items:
            raise UserError(f"--data {root}: no picture with a caption for the {split} split; {DATA_HELP}")
        self.size = size
        # small pictures are decoded once and kept; larger sets are read by worker processes
        self.cache = {} if len(self.items) * 3 * size**2 <= 256e6 else None

    def __len__(self):
        return len(self.items)

    def picture(self, i):
        """(3, S, S) uint8; raises one of BROKEN."""
        path = self.items[i][0]
        if self.cache is None or path not in self.cache:
            picture = torch.from_numpy(load_picture(path, self.size)).permute(2, 0, 1)
            if self.cache is None:
                return picture
            self.cache[path] = picture
        return self.cache[path]

    def __getitem__(self, index):
        i, draw = index
        rng, broken = random.Random(draw), []
        for _ in range(20):
            try:
                return self.picture(i), rng.choice(self.items[i][1]), broken
            except BROKEN:
                broken.append(str(self.items[i][0]))
                i = rng.randrange(len(self))
        return None, "", broken                        # `BrokenPictures` raises: from a worker process it would be a long traceback


class Draws:
    """The batches of a training: step s is a function of the seed and of s alone, so a resumed run sees what it would have seen.

    Iterating gives, for each step from `start` to `stop`, the list of (index, draw) that `CaptionedImages` takes. Every picture
    comes once an epoch, in a new order each time. Of several ranks each gets its part of every batch.
    """
    def __init__(self, length, batch, start, stop, seed, rank=0, ranks=1):
        self.length, self.batch, self.start, self.stop, self.seed, self.rank, self.ranks = length, batch, start, stop, seed, rank, ranks

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        epoch, order = -1, None
        for step in range(self.start, self.stop):
            places, share = [], self.batch // self.ranks
            for position in range(step * self.batch + self.rank * share, step * self.batch + (self.rank + 1) * share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 9973 + epoch)).tolist()
                places.append((order[position % self.length], self.seed * 10**12 + position))
            yield places


def collate(items):
    """A list of items of `CaptionedImages` as one batch."""
    pictures, texts, broken = zip(*items)
    broken = [path for paths in broken for path in paths]
    return None if any(picture is None for picture in pictures) else torch.stack(pictures), list(texts), broken


def batches(dataset, batch, start, stop, seed, workers=None, ranks=None):
    """A loader of (pictures uint8 (B, 3, S, S), or what else the data set's `picture` gives, list of captions, broken paths), one item a step.

    workers: processes that decode; None chooses none where the pictures are kept in memory, else one a core, eight at most.
    ranks: `Ranks`, of which this one gets its share of each batch.
    """
    rank, count = (ranks.rank, ranks.count) if ranks else (0, 1)
    if workers is None:
        workers = 0 if dataset.cache is not None else min(8, max(1, (os.cpu_count() or 1) // count))
    return torch.utils.data.DataLoader(dataset, batch_sampler=Draws(len(dataset), batch, start, stop, seed, rank, count), collate_fn=collate,
                                       num_workers=workers, pin_memory=torch.cuda.is_available())


class BrokenPictures:
    """Keeps count of the pictures that could not be read: warns of the first, stops above 1 % of the data set."""
    def __init__(self, total):
        self.total, self.paths = total, set()

    def add(self, paths, pictures=True):
        """Of a batch: the paths that could not be read, and its pictures, None if nothing could be found in the place of one."""
        for path in paths:
            if not self.paths:
                print(f"\nwarning: {path} cannot be read; another picture takes its place (further ones are only counted)")
            self.paths.add(path)
        if len(self.paths) > 0.01 * self.total:
            raise UserError(f"{len(self.paths)} of {self.total:,} pictures cannot be read, more than 1 % (one is {sorted(self.paths)[0]}): "
                            "mend or remove them")
        if pictures is None:
            raise UserError(f"twenty pictures in a row could not be read, the last one {paths[-1]}: is the folder damaged?")


def to_float(pictures):
    """uint8 [0, 255] -> float [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] (B, 3, H, W) -> numpy uint8 (B, H, W, 3)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------- text encoder
def load_pretrained(kind, path, flag, name, device, reader="AutoTokenizer", **more):
    """A frozen model of transformers, of class `kind`, and its tokenizer, or another `reader` that prepares what it takes.

    path: a folder in the Hugging Face format or a name on its hub.

    Raises UserError, with the flag that named it and what it should be the `name` of, if it cannot be loaded or lacks some of its weights.
    """
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kernel = "eager" if torch.device(device).type == "cpu" else "sdpa"         # the fused kernel is slow on CPUs at short sequences
    if str(path).startswith(("/", ".")) and not Path(path).exists():          # no name on the hub begins so
        raise UserError(f"{flag} {path} cannot be loaded as a {name}: there is no such folder")
    try:
        tokenizer = getattr(transformers, reader).from_pretrained(path)
        if kind == "AutoModel" and "t5" in transformers.AutoConfig.from_pretrained(path).model_type:
            kind = "AutoModelForTextEncoding"                                  # of T5 the half that reads
        model, info = getattr(transformers, kind).from_pretrained(path, attn_implementation=kernel, output_loading_info=True, **more)
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise UserError(f"{flag} {path} cannot be loaded as a {name}: {str(error).strip().splitlines()[0]}") from None
    if missing := [name for name in info["missing_keys"] if "pooler" not in name]:      # BERT's pooler is often left out, and asked by nobody
        raise UserError(f"{flag} {path} is no {name}: {len(missing)} of its weights are missing")
    return model.to(device).eval().requires_grad_(False), tokenizer


class TextEncoder:
    """A frozen CLIP text model: captions -> features per token.

    path: a folder in the Hugging Face format or a name on its hub. `length` is L, the number of tokens; `dim` is D.
    Raises UserError if it cannot be loaded.
    """
    def __init__(self, path, device="cpu"):
        self.device, self.cut = torch.device(device), 0
        self.model, self.tokenizer = load_pretrained("CLIPTextModel", path, "--clip", "CLIP text model", device)
        self.length = self.model.config.max_position_embeddings
        self.dim = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions):
        """captions: a list of B strings. Returns features (B, L, D) float32 and mask (B, L) bool, True on real tokens.

        Padded to L, as the published U-ViT was trained. The model attends causally, so padding behind a caption does not change its
        features, and no mask is given to it. Longer captions are cut; the first cut is warned of, `self.cut` counts them.
        """
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        full = tokens.attention_mask.all(1)
        if full.any():
            lengths = [len(ids) for ids in self.tokenizer([c for c, f in zip(captions, full.tolist()) if f]).input_ids]
            over = sum(n > self.length for n in lengths)
            if over and not self.cut:
                print(f"\nwarning: a caption is longer than the {self.length} tokens that the text encoder reads; its end is cut off "
                      "(further ones are only counted)")
            self.cut += over
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):      # a large CLIP in fp32 would cost a GPU
            features = self.model(tokens.input_ids.to(self.device)).last_hidden_state                   # as much as the whole training step
        return features.float(), tokens.attention_mask.bool().to(self.device)


def fingerprint(model, more=""):
    """Names a frozen model, and what `more` says, down to its weights: hex. Another precision has the same."""
    digest = hashlib.sha256(more.encode())
    # the beginning of each tensor (all of 7 billion took a minute), in bf16 so that it is the same in whichever precision they are loaded
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.flatten()[:64].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class LLMEncoder:
    """A frozen language model, causal (Llama, Qwen, Gemma) or encoder (T5, BERT), as a reader: texts -> hidden states per token.

    path: a folder in the Hugging Face format or a name on its hub; layer: 0 is the embeddings, -1 the last layer; instruction: a text put
    before each prompt, whose own tokens are cut off again; dtype: of the weights. `dim` is D, `length` the most tokens it reads.
    `identity` names the model, down to its weights: features of another do not fit. Raises UserError if it cannot be loaded.
    """
    def __init__(self, path, layer=-1, instruction="", device="cpu", dtype=torch.float32):
        self.device, self.instruction, self.cut = torch.device(device), instruction, 0
        self.model, self.tokenizer = load_pretrained("AutoModel", path, "--llm", "language model", device, dtype=dtype)
        text = self.model.config.get_text_config()
        layers = text.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"--llm-layer {layer}: {path} has layers 0 (the embeddings) to {layers}, or -1 (the last) to {-layers - 1}")
        self.dim = text.hidden_size
        # tokenizers without a limit of their own name a huge one, T5 has no limit of places: 4096 tokens are enough for a prompt
        self.length = min(self.tokenizer.model_max_length, getattr(text, "max_position_embeddings", None) or 4096, 4096)
        start, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.pad = next(token for token in (pad, end, start, 0) if token is not None)                  # Llama has none of its own
        self.alone = next(token for token in (start, end, self.pad) if token is not None)
        self.identity = fingerprint(self.model, f"{instruction}{layer % (layers + 1)}")
        self.layer = layer % (layers + 1)
        # What comes after the layer that is read need not be computed, but for one: behind its last layer a model puts its final norm
        if self.layer < layers and hasattr(self.model, "layers"):
            self.model.layers = self.model.layers[:self.layer + 1]

    def tokens(self, texts):
        """Token numbers of each text, behind those of the instruction, which are as many as the second list says."""
        whole, heads = self.tokenizer([self.instruction + text for text in texts]).input_ids, [0] * len(texts)
        if self.instruction:
            alone = self.tokenizer(self.instruction).input_ids
            # as many as the two have in common: at the seam a token may belong to both, at the end some tokenizers put a mark
            heads = [min(len(os.path.commonprefix([alone, ids])), len(ids) - 1, self.length - 1) for ids in whole]
        over = sum(len(ids) > self.length for ids in whole)
        if over and not self.cut:
            print(f"\nwarning: a text is longer than the {self.length} tokens that {self.model.config.model_type} reads; its end is cut off "
                  "(further ones are only counted)")
        self.cut += over
        return [ids[:self.length] or [self.alone] for ids in whole], heads     # some tokenizers make nothing of the empty prompt

    @torch.no_grad()
    def __call__(self, texts):
        """texts: a list of B strings. Returns features (B, n, D) float32 and mask (B, n) bool, True on real tokens, n those of the longest."""
        ids, heads = self.tokens(texts)
        rows = [torch.tensor(row) for row in ids]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad).to(self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        places = torch.arange(tokens.shape[1], device=self.device)
        mask = places < lengths[:, None]
        features = self.model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states[self.layer]
        heads = torch.tensor(heads, device=self.device)[:, None]              # each row begins behind its own instruction
        n = int((lengths[:, None] - heads).max())
        features = features.gather(1, (heads + places[:n]).clamp(max=len(places) - 1)[..., None].expand(-1, -1, self.dim))
        return features.float(), places[:n] < lengths[:, None] - heads


class CachedLLM:
    """What an `LLMEncoder` makes of many texts, computed once into a memory-mapped file, float16; it is called as the encoder is.

    folder gets features.npy, (tokens of all texts, D), and features.json, which says what they were made from; interrupted, it goes on.
    A text that is not among them is read by the encoder. Raises UserError if the folder holds those of another model or of other texts.
    """
    def __init__(self, llm, texts, folder, batch=32):
        texts = sorted(set(texts), key=lambda text: (len(text), text))        # texts of like length side by side
        self.llm, self.dim, self.device, self.place = llm, llm.dim, llm.device, {text: i for i, text in enumerate(texts)}
        parts = [texts[i:i + batch] for i in range(0, len(texts), batch)]
        self.begin = np.cumsum([0] + [len(ids) - head for part in parts for ids, head in zip(*llm.tokens(part))])
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()

        def stream(note):
            first = np.searchsorted(self.begin, note["done"])
            for start in range(first, len(texts), batch):
                features, mask = llm(texts[start:start + batch])
                yield features[mask].clamp(-65_000, 65_000).half().cpu().numpy()
        self.rows, _ = collect(Path(folder) / "features.npy", {"model": llm.identity, "texts": digest}, (int(self.begin[-1]), llm.dim), np.float16,
                               stream, f"reading {len(texts):,} texts", "token", "--features")

    def __call__(self, texts):
        """As `LLMEncoder`: features (B, n, D), mask (B, n)."""
        if any(text not in self.place for text in texts):
            return self.llm(texts)
        spans = [(self.begin[self.place[text]], self.begin[self.place[text] + 1]) for text in texts]
        features = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(self.rows[a:b].astype(np.float32)) for a, b in spans], batch_first=True)
        mask = torch.arange(features.shape[1]) < torch.tensor([b - a for a, b in spans])[:, None]
        return features.to(self.device), mask.to(self.device)


# ------------------------------------------------------------------------------------------------------------------------ LoRA
class LowRank(torch.nn.Module):
    """W -> W + B A, of rank `rank` (Hu et al. 2021, arXiv 2106.09685): W (out, in) stays, A and B are trained; B begins at zero."""
    def __init__(self, weight, rank):
        super().__init__()
        rows, columns = weight.shape
        self.A = torch.nn.Parameter(torch.randn(rank, columns, device=weight.device) * columns**-0.5)
        self.B = torch.nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        return weight + self.B @ self.A


def add_lora(model, rank, names=("qkv", "proj")):
    """Freezes a model and puts a `LowRank` on each of its linear layers of these names (the last part of the path), in place; returns it.

    Whoever reads `layer.weight` gets the sum, also where it is no layer's forward that reads it. What is to be trained requires a gradient.
    """
    model.requires_grad_(False)
    linear = [module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and path.split(".")[-1] in names]
    if not linear:
        raise UserError(f"LoRA: {type(model).__name__} has no linear layer named {' or '.join(names)}")
    for module in linear:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    return model


def merge_lora(model):
    """Writes W + B A into the weights, in place: a model as it was before `add_lora`, by its names, that does what the tuned one did."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ device and precision
def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): try --device cpu") from None
    return torch.device(name)


def synchronize(device):
    """Waits until a GPU has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_rate(device, dtype, size=1024, seconds=0.3):
    """Multiply-adds times two a second, of a square matrix product."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    synchronize(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            a @ a
        synchronize(device)
        count += 4
    return 2 * size**3 * count / (time.perf_counter() - start)


def pick_precision(name, device):
    """"bf16" or "fp32" as asked; "auto" takes bf16 where a probe of under a second finds its matrix products 1.5 times faster."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    fast = matmul_rate(device, torch.bfloat16) > 1.5 * matmul_rate(device, torch.float32)
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------------------ run folder
@contextlib.contextmanager
def whole(path):
    """Gives a name to write a file under, which takes its own when it is written: so it is there whole or not at all."""
    unfinished = Path(f"{path}.unfinished")
    yield unfinished
    os.replace(unfinished, path)


def save_tensors(tensors, path):
    with whole(path) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)


def read_weights(path, named, expected=""):
    """The tensors of a weights file by name: .safetensors, or a pickle of tensors (.pth, .pt, .ckpt, .bin), whose code is never run.

    named: the flag and what it was given, or what else the file is, with which a UserError begins, if it is missing, damaged or holds code;
    expected: what its line ends with.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{named}: there is no file {path}{expected}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))      # older files are no zip
        for inner in ("state_dict", "model"):                                 # training checkpoints keep the weights one level down
            content = content.get(inner, content)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:                                                # the bytes of a damaged file can lead anywhere
        if "GLOBAL" in str(error):
            raise UserError(f"{named} holds code beside its tensors, which is not run: take the same model's .safetensors file") from None
        raise UserError(f"{named} is damaged, cut off or no file of tensors: copy or download it again{expected}") from None


def load_into(model, tensors, path):
    """model.load_state_dict, with one line that says what does not fit."""
    own = model.state_dict()
    wrong = [f"{n}: no such parameter here" for n in tensors if n not in own] + [f"{n}: missing in the file" for n in own if n not in tensors]
    wrong += [f"{n}: {tuple(tensors[n].shape)} in the file, {tuple(own[n].shape)} here"
              for n in own if n in tensors and tensors[n].shape != own[n].shape]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise UserError(f"{path} is of another configuration ({wrong[0]}{more}): use the config.json that it was trained with")
    model.load_state_dict(tensors)


def write_json(path, content):
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def collect(path, made_from, shape, dtype, stream, doing, unit="picture", flag="", **more):
    """An array that takes long to compute, filled batch by batch into a memory-mapped file; interrupted, it goes on at a second start.

    path: of the .npy; a .json beside it tells what the rows were `made_from`, how many are "done", and `more`, which may be another next time.
    stream(note): iterates over batches of rows, (B, ...), from row note["done"] on, and may keep more in the note; doing: for the progress bar.
    flag: names another folder; with it, rows made from something else are refused, without, it says so and begins anew.
    Returns the array and the note. Raises UserError, too, for a file that is damaged and a disk that is too small.
    """
    file, note, elsewhere = path.with_suffix(".json"), made_from | more | {"done": 0}, flag and f", or name another folder with {flag}"
    if file.exists() and (flag or path.exists()):
        before = read_json(file)
        other = ", ".join(name for name in made_from if before.get(name) != made_from[name])
        if other and flag:
            raise UserError(f"{path.parent}/ holds {path.stem} of something else (other {other}): delete it{elsewhere}")
        if other:
            print(f"{file} was made from another {other}: beginning anew")
        else:
            note = before
    if not note["done"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)                                          # first, since it speaks of the array
        path.unlink(missing_ok=True)
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        if shutil.disk_usage(path.parent).free < needed:                      # a memory map that finds the disk full kills the process
            raise UserError(f"{path} will take {needed / 1e9:.1f} GB, more than the disk has left: make room{elsewhere}")
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        write_json(file, note)
    elif note["done"] < shape[0]:
        print(f"{file}: {note['done']:,} of {shape[0]:,} {unit}s are done already")
    rows = None
    with contextlib.suppress(OSError, ValueError):
        rows = np.lib.format.open_memmap(path, "r")                           # r+ would fill up a file that was cut off
    if rows is None or (rows.shape, rows.dtype) != (shape, dtype):
        raise UserError(f"{path} is damaged or missing: delete {file.name}{elsewhere}")
    if note["done"] < shape[0]:
        rows = np.lib.format.open_memmap(path, "r+")
        with tqdm(total=shape[0], initial=note["done"], desc=doing, unit=unit) as progress:
            for batch in stream(note):
                rows[note["done"]:note["done"] + len(batch)] = batch
                rows.flush()                                                  # first the rows, then the word that they are there
                note["done"] += len(batch)
                write_json(file, note)
                progress.update(len(batch))
    return rows, note


# ------------------------------------------------------------------------------------------------------- settings and flags
def setting(default, text, low=-math.inf, high=math.inf, above=None, choices=None):
    """A field of a dataclass of settings, with the help text of its flag and what `check_limits` allows: low <= value <= high, above < value."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "above": above, "choices": choices})


def check_limits(settings):
    """Raises UserError for a number out of its range (or nan) and for a word that is none of the choices."""
    for field in dataclasses.fields(settings):
        if not field.metadata:
            continue
        value, flag = getattr(settings, field.name), f"--{field.name.replace('_', '-')}"
        low, high, above, choices = (field.metadata[name] for name in ("low", "high", "above", "choices"))
        if choices and value not in choices:
            raise UserError(f"{flag} {value}: choose {', '.join(choices)}")
        for number in value if isinstance(value, tuple) else [value] if isinstance(value, (int, float)) else []:
            if above is not None and not number > above:
                raise UserError(f"{flag} {number}: choose more than {above}")
            if not low <= number <= high:
                raise UserError(f"{flag} {number}: choose {low} {f'to {high}' if high < math.inf else 'or more'}")


def add_setting_flags(parser, settings, named="toy:", only=()):
    """One flag a field that has a help text: `image_blocks` -> --image-blocks; a switch that is on has its --no-. named: what defaults are called.

    only: names of fields, if the others shall have none. Flags that are not given are absent, so that a preset can fill them.
    """
    for field in dataclasses.fields(settings):
        if not field.metadata or only and field.name not in only:
            continue
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
        elif field.type is tuple:
            kind = {"type": type(field.default[0]), "nargs": len(field.default)}
        text = field.metadata["help"] + ("" if field.default is None or field.default is False else f" ({named} {field.default})")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)


def make_settings(settings, presets, args):
    """The settings of a preset (without presets: the defaults), with the flags that were given put over it. Raises UserError for an unknown one."""
    if presets and args.preset not in presets:
        raise UserError(f"--preset {args.preset}: choose {' or '.join(presets)}")
    names = {field.name for field in dataclasses.fields(settings)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items() if name in names}
    return settings(**(presets[args.preset] if presets else {}) | given)


@dataclasses.dataclass
class Options:
    """How a training is run: unlike the settings, nothing that its result depends on or that the run remembers."""
    resume: bool = setting(False, "go on with the run in --out, where it stopped")
    overwrite: bool = setting(False, "start anew in a folder that holds a run")
    save_every: int = setting(1000, "steps between checkpoints", low=1)
    workers: int = setting(None, "processes that read pictures (default: none for small pictures and latents, else one a core)", low=0, high=64)
    latents: str = setting("data/latents", "folder that keeps the latents of the pictures")
    accumulate: int = setting(1, "parts that a batch is worked through in", low=1)
    recompute: bool = setting(False, "activation checkpointing: less memory, a third more work")
    compile: bool = setting(False, "torch.compile (needs a C++ compiler on CPUs)")
    watch: bool = False                  # on the toy world: grade a few captions now and then, and keep the weights nearest to half right

    def __post_init__(self):
        check_limits(self)


def run_files(path):
    """(folder, weights) of what names a run: its folder, or a .safetensors file in one."""
    path = Path(path)
    return (path.parent, path) if path.suffix == ".safetensors" else (path, path / "model.safetensors")


def read_settings(settings, folder, name="config.json"):
    """The settings of a run from its config.json, or of what it stands on from another file of that kind."""
    content, names = read_json(Path(folder) / name), {field.name for field in dataclasses.fields(settings)}
    if unknown := sorted(set(content) - names) if isinstance(content, dict) else ["it is no object"]:
        raise UserError(f"{folder}/{name} is no configuration of this method (not known: {', '.join(unknown)})")
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})


def positive(text):
    """The type of a flag that takes 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def add_machine_flags(parser):
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto takes bf16 where a short probe finds it faster")


def add_training_flags(parser, settings, presets, out, *options):
    """What every training has: --preset, --out with its help text, those `Options` that are named (without names, all), --device and --precision,
    and one flag a setting."""
    parser.add_argument("--preset", default="toy", help=f"settings to start from: {' or '.join(presets)} (default toy)")
    parser.add_argument("--out", help=out)
    add_setting_flags(parser, Options, "default", options)
    add_machine_flags(parser)
    add_setting_flags(parser.add_argument_group("settings of a training"), settings)


class Interrupt:
    """While it is entered, Ctrl-C (or a polite kill) only sets `asked`, so that a training can finish its step and save; a second Ctrl-C ends it."""
    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT and "WORLD_SIZE" not in os.environ:      # torchrun passes on each Ctrl-C once more
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, error, *_):
        for number, handler in self.before.items():
            # torchrun kills the others when one has ended: they should still get to say why they end
            if not (error and "WORLD_SIZE" in os.environ and number == signal.SIGTERM):
                signal.signal(number, handler)


def check_run(folder, options):
    """Refuses to start a training over another by mistake."""
    if any((Path(folder) / name).exists() for name in ("state.pt", "model.safetensors")) and not options.resume and not options.overwrite:
        raise UserError(f"{folder}/ holds a run already: --resume to go on, --overwrite to start anew, --out for another folder")


def check_settings(folder, settings):
    """Raises UserError if the run in a folder was made with other settings than these, or from another base or LLM of the same name."""
    there, here = read_json(Path(folder) / "config.json"), json.loads(json.dumps(dataclasses.asdict(settings)))
    for name in (field.name for field in dataclasses.fields(settings) if field.metadata):          # those with a flag
        if there.get(name) != here[name]:
            raise UserError(f"{folder}/ was made with {name} = {there.get(name)}, now it is {here[name]}: "
                            "give the settings of the first start, or another --out")
    for name in ("base", "llm"):                                                                   # down to their weights
        if there.get(f"{name}_identity") != here.get(f"{name}_identity"):
            raise UserError(f"{folder}/ was begun from {here[name]} as it was then, now it is another: put it back, or start anew with --overwrite")


@torch.no_grad()
def follow(average, model, decay):
    """One step of the running average of a model's weights, in place: average = decay average + (1 - decay) model."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def open_run(folder, settings, options, precision=None):
    """Makes the folder of a training and writes config.json, or checks the one that is there; returns the content of state.pt, or None.

    precision: with which it goes on, if state.pt tells the one that it was trained in.
    Raises UserError if a run is there that is neither to be resumed nor overwritten, if there is none to resume, or if its settings or its
    precision are others.
    """
    folder = Path(folder)
    if options.resume:
        if not (folder / "state.pt").exists():
            raise UserError(f"--resume: {folder}/ holds no state.pt to go on from: start anew with --overwrite")
        check_settings(folder, settings)
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder}/state.pt is damaged ({str(error).splitlines()[0]}): start anew with --overwrite") from None
        if precision and state.get("precision", str(precision)) != str(precision):
            raise UserError(f"--resume: {folder}/ was trained in {state['precision']}, now it would be in {precision}: name it with --precision")
        return state
    check_run(folder, options)
    for name in ("state.pt", "*.safetensors", "results.json", "compared.json", "metrics*.csv"):
        for old in folder.glob(name):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dataclasses.asdict(settings))
    return None


def pick_up(options, folder):
    """The options of one run of a comparison, whose command can be given again: an interrupted run goes on, and so does a finished one, which has
    no step left; with --overwrite each begins anew."""
    return dataclasses.replace(options, resume=not options.overwrite and (Path(folder) / "state.pt").exists(), overwrite=True)


class Metrics:
    """metrics.csv, a row every so many steps; the first column is the step. On resuming, rows beyond the checkpoint's step are dropped."""
    def __init__(self, folder, names, start=0, file="metrics.csv"):
        self.path = Path(folder) / file
        rows = []
        if start and self.path.exists():
            rows = [row for row in csv.reader(open(self.path)) if row and row[0].isdigit() and int(row[0]) <= start]
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])

    def add(self, *values):
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])

    def column(self, name):
        """[(value of the first column, value), ...] of one column, for `plot`."""
        with open(self.path, newline="") as file:
            return [(int(next(iter(row.values()))), float(row[name])) for row in csv.DictReader(file) if row[name]]
