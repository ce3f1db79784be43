"""Frozen models in the Hugging Face format: text encoders, language models, CLIP, scorers.

    captions -> TextEncoder -> features (B, L, D), token_mask (B, L)
    texts    -> LLMEncoder  -> features (B, n, D), token_mask (B, n)
    images, texts -> ClipScorer -> unit vectors (B, D)

Each is a folder or a name on the hub; anything else is refused with one line.
"""
import contextlib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants as hub
from tqdm import tqdm

import common
from common import UserError


def hub_answers(seconds=5):
    """Can the Hugging Face hub be reached? Without a network, its client takes 48 s to give up."""
    answers = []

    def ask():
        try:
            answers.append(urllib.request.urlopen(hub.ENDPOINT, timeout=seconds))
        except urllib.error.HTTPError as refusal:       # an answer, too
            answers.append(refusal)
        except OSError:
            pass
    # in a thread, since looking up a name has no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def check_path(path):
    """Refuses what is not a model, and goes offline where there is no network."""
    folder = Path(path)
    is_gguf = str(path).lower().endswith("gguf") or any(folder.glob("*.gguf"))
    if is_gguf and not (folder / "config.json").exists():
        raise OSError("GGUF must be converted: expected the model in the Hugging Face format, a "
                      "folder with config.json, .safetensors and a tokenizer")
    if folder.exists():
        return
    if str(path).startswith(("/", ".")):                # so it does not ask the hub for "./name"
        raise OSError("there is no such folder")
    if not hub.is_offline_mode() and not hub_answers():
        hub.HF_HUB_OFFLINE = True                       # what is in the hub's cache still loads


OWN_TOKENIZER = ("the model's own tokenizer files must be in its folder (Stable Diffusion keeps "
                 "them in tokenizer/)")


def check_tokenizer(tokenizer, config):
    """If the files are missing, transformers makes up a tokenizer of about two words."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", len(tokenizer))
    if not 0.5 * vocabulary <= len(tokenizer) <= 1.1 * vocabulary:
        raise OSError(f"the model has {vocabulary} tokens, its tokenizer {len(tokenizer)}: "
                      f"{OWN_TOKENIZER}")
    tokenizer(["a caf\u00e9 \u2603"])                   # fails if its files do not fit together


def reason_not_loaded(error):
    """An error from transformers in one line, with the remedy."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    message = str(error).strip()
    if "trust_remote_code" in message:
        return ("it comes with Python code, which is not run by default: read that code, then "
                "add --trust-remote-code")
    if "tiktoken" in message and "backend tokenizer" not in message:
        # said of every tokenizer.model that could not be read
        packages = {"sentencepiece": is_sentencepiece_available(),
                    "protobuf": is_protobuf_available()}
        missing = [package for package, available in packages.items() if not available]
        if missing:
            return f"its tokenizer.model needs more packages: pip install {' '.join(missing)}"
        return "its tokenizer.model is damaged: copy it again"
    if "backend tokenizer" in message:
        return OWN_TOKENIZER
    return message.split("\n")[0]


def attention_kernel(device):
    """transformers' attn_implementation: plain on CPUs, whose fused kernel is slow; None: its own.

    Not "sdpa" elsewhere, which BLIP and Mask2Former refuse.
    """
    return "eager" if torch.device(device).type == "cpu" else None


def load_pretrained(kind, path, flag, name, device, processor="AutoTokenizer", **kwargs):
    """A frozen model of transformers (class name `kind`) and its tokenizer or other processor.

    path: a folder in the Hugging Face format or a name on the hub; messages call it `name`.
    "AutoModel" loads only the encoder of a model that has other parts too.
    """
    import transformers  # takes seconds, and --help needs none of it

    transformers.utils.logging.set_verbosity(50)        # its warnings are for developers
    transformers.utils.logging.disable_progress_bar()
    kwargs = {"attn_implementation": attention_kernel(device)} | kwargs
    trust = common.TRUST_REMOTE_CODE
    try:
        check_path(path)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust)
        if kind == "AutoModel" and config.model_type.startswith("clip"):
            kind = "CLIPTextModel"
        elif kind == "AutoModel" and "t5" in config.model_type:
            kind = "AutoModelForTextEncoding"
        loader = getattr(transformers, processor)
        processor = loader.from_pretrained(path, trust_remote_code=trust)
        if isinstance(processor, transformers.PreTrainedTokenizerBase):
            check_tokenizer(processor, config)
        model, info = getattr(transformers, kind).from_pretrained(
            path, output_loading_info=True, trust_remote_code=trust, **kwargs)
    except BaseException as error:                      # a damaged file can raise nearly anything
        if not common.is_failure(error):
            raise
        reason = reason_not_loaded(error)
        raise UserError(f"{flag} {path} cannot be loaded as a {name}: {reason}") from None
    # BERT's pooler is often left out, and nothing here reads it
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    if missing:
        raise UserError(f"{flag} {path} is not a {name}: {len(missing)} of its weights are missing")
    return model.to(device).eval().requires_grad_(False), processor


def load_tokenizer(folder):
    import transformers
    with common.reading(f"--clip {folder}", "the tokenizer that --clip words wrote is missing "
                        "or damaged: restore the run's own folder"):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


class OneHot(nn.Module):
    """In place of a text model: token i -> the i-th unit vector, times sqrt(D), (B, L, D).

    The linear layer that reads it, the U-ViT's `context_embed`, is a table of word embeddings.
    """
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, input_ids, attention_mask):
        features = self.dim**0.5 * F.one_hot(input_ids, self.dim).float()
        return SimpleNamespace(last_hidden_state=features)


class TextEncoder:
    """A frozen text model: CLIP's, or another encoder (T5, BERT). `length` is L; `dim` is D.

    path: a folder or name as in `load_pretrained`, or <a run of --clip words>/words.
    """
    def __init__(self, path, device="cpu"):
        self.device = torch.device(device)
        self.is_clip = False
        if Path(path).name == "words":
            self.tokenizer = load_tokenizer(path)
            self.model = OneHot(len(self.tokenizer))
            self.dim = self.model.dim
            positions = self.tokenizer.model_max_length
        else:
            self.model, self.tokenizer = load_pretrained(
                "AutoModel", path, "--clip", "text encoder", device)
            config = self.model.config.get_text_config()
            self.is_clip = config.model_type == "clip_text_model"
            self.dim = config.hidden_size
            positions = getattr(config, "max_position_embeddings", None) or 77
        if self.tokenizer.pad_token is None:
            raise UserError(f"--clip {path}: it reads one text at a time, not batches: use a CLIP, "
                            "T5 or BERT")
        self.warned = True                              # the text below is nobody's caption
        with common.reading(f"--clip {path}", "its tokenizer files do not match: copy them again"):
            # as in CLIP: the U-ViT has a position for each token, and captions are short
            self.length = min(77, positions, self.tokenizer.model_max_length)
            if self.length < 1:
                raise ValueError("it reads no tokens")
            self.encode(["a caf\u00e9 \u2603"])
        self.warned = False
        self.row_of = {}                                # caption -> its row of `kept`
        self.kept = None                                # features (N, L, D), token_mask (N, L)

    def keep(self, captions, memory=2**29, progress=True):
        """Encodes captions in advance, for training, if their features fit into `memory` bytes.

        Captions repeat, and a GPU takes as long for a step's few new ones as for hundreds.
        The default is just enough for the toy world and its tiny CLIP.
        """
        captions = list(dict.fromkeys(["", *captions]))          # "" stands for dropped ones
        if 4 * len(captions) * self.length * self.dim > memory:
            return
        features = torch.empty(len(captions), self.length, self.dim, device=self.device)
        masks = torch.empty(features.shape[:2], dtype=torch.bool, device=self.device)
        starts = range(0, len(captions), 512)
        for first in tqdm(starts, "encoding captions", leave=False, disable=not progress):
            rows = slice(first, first + 512)
            features[rows], masks[rows] = self.encode(captions[rows])
        self.kept = features, masks
        self.row_of = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, captions):
        """B captions -> features (B, L, D) float32, token_mask (B, L) bool."""
        rows = [self.row_of.get(caption) for caption in captions]
        if None in rows:
            return self.encode(captions)
        rows = common.to_device(torch.tensor(rows), self.device)
        return tuple(part[rows] for part in self.kept)

    @torch.no_grad()
    def encode(self, captions):
        """What `__call__` returns, computed afresh.

        Padded to L, as in the published U-ViT's training. Padding does not change the features of a
        caption: CLIP attends causally, the others get the mask. Longer captions are cut off.
        """
        tokens = self.tokenizer(captions, padding="max_length", truncation=True,
                                max_length=self.length, return_tensors="pt")
        if not self.warned and tokens.attention_mask.all(1).any():       # one without any padding
            whole = self.tokenizer(captions, verbose=False).input_ids
            longest = max(len(ids) for ids in whole)
            if longest > self.length:
                print(f"\nwarning: a caption has {longest} tokens; the text encoder reads "
                      f"{self.length}, the rest is cut off")
                self.warned = True
        mask = tokens.attention_mask.to(self.device)
        # in fp32 a large CLIP would take a GPU as long as the rest of the training step
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model(input_ids=tokens.input_ids.to(self.device),
                                attention_mask=None if self.is_clip else mask)
        return output.last_hidden_state.float(), mask.bool()


class LLMEncoder:
    """A frozen language model, causal (Llama, Qwen, Gemma) or encoder (T5, BERT).

    layer: 0 is the embeddings, -1 the last layer; instruction: a text put before each prompt;
    its own states are cut off again. `dim` is D. `identity` names model, layer and instruction.
    """
    def __init__(self, path, layer=-1, instruction="", device="cpu", dtype=torch.float32):
        self.device = torch.device(device)
        self.model, self.tokenizer = load_pretrained(
            "AutoModel", path, "--llm", "language model", device, dtype=dtype)
        config = self.model.config.get_text_config()
        layers = config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"--llm-layer {layer}: {path} has layers 0 (the embeddings) to "
                            f"{layers}, or -1 (the last) to {-layers - 1}")
        self.layer = layer
        self.dim = config.hidden_size
        # tokenizers without a limit name a huge one; 4096 tokens are enough for a prompt
        positions = getattr(config, "max_position_embeddings", None) or 4096
        with common.reading(f"--llm {path}", "its tokenizer files do not match: copy them again"):
            self.length = min(self.tokenizer.model_max_length, positions, 4096)
        self.pad = self.tokenizer.pad_token_id
        if self.pad is None:                            # as in Llama's tokenizer
            self.pad = self.tokenizer.eos_token_id or 0
        self.instruction = instruction
        self.prefix = 0                                 # the number of the instruction's tokens
        if instruction:
            # They are what two prompts after it have in common. One is kept where the prompt ""
            # would be left with no token at all.
            prompts = [instruction + text for text in ("a", "7", "")]
            ids_a, ids_7, alone = self.tokenizer(prompts).input_ids
            self.prefix = min(len(os.path.commonprefix([ids_a, ids_7])), len(alone) - 1)
            if self.prefix >= self.length:
                raise UserError(f"--instruction has {self.prefix} tokens, but {path} reads only "
                                f"{self.length}: no prompt would be read")
        self.identity = common.fingerprint(self.model, f"{instruction}{layer % (layers + 1)}")

    @torch.no_grad()
    def __call__(self, texts):
        """B texts -> features (B, n, D) float32, token_mask (B, n) bool; n: of the longest."""
        ids = self.tokenizer([self.instruction + text for text in texts]).input_ids
        # some tokenizers turn "" into no token at all
        rows = [torch.tensor(row[:self.length] or [self.pad]) for row in ids]
        ones = [torch.ones_like(row) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        tokens = pad(rows, batch_first=True, padding_value=self.pad).to(self.device)
        mask = pad(ones, batch_first=True).to(self.device)
        output = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        states = output.hidden_states[self.layer].float()
        return states[:, self.prefix:], mask[:, self.prefix:].bool()


class ClipScorer:
    """A whole frozen CLIP, in fp32: images and texts -> vectors of length 1; `dim` is D."""
    def __init__(self, path, device="cpu"):
        from transformers import CLIPImageProcessorPil
        self.model, self.tokenizer = load_pretrained(
            "CLIPModel", path, "--clip-model", "CLIP of text and images", device,
            dtype=torch.float32)
        processor = CLIPImageProcessorPil()             # mean and deviation of OpenAI's CLIP,
        with contextlib.suppress(OSError):              # unless the folder has others
            processor = CLIPImageProcessorPil.from_pretrained(path)
        self.path = str(path)
        self.device = torch.device(device)
        self.mean = torch.tensor(processor.image_mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std, device=device).view(3, 1, 1)
        self.side = self.model.config.vision_config.image_size
        self.length = self.model.config.text_config.max_position_embeddings
        self.dim = self.model.config.projection_dim
        self.tiny = self.side < 224                     # the toy world's; published ones read 224
        # Hessel et al. put these words before each caption; the tiny CLIP has never read them
        self.prefix = "" if self.tiny else "A photo depicts "

    def images(self, images):
        """uint8 (B, H, W, 3) -> (B, D). CLIP sees the centre square, resized to its own side."""
        x = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2).float()     # (B, 3, H, W)
        shorter = min(x.shape[2:])
        if shorter != self.side:
            size = [side * self.side // shorter for side in x.shape[2:]]
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top = (x.shape[2] - self.side) // 2
        left = (x.shape[3] - self.side) // 2
        x = x[:, :, top:top + self.side, left:left + self.side] / 255
        features = self.model.get_image_features(pixel_values=(x - self.mean) / self.std)
        return F.normalize(features.pooler_output, dim=-1)

    def texts(self, texts):
        """B texts, each cut off at CLIP's limit -> (B, D)."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.device)
        features = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output, dim=-1)

    def score(self, image_features, captions):
        """CLIP score, 2.5 max(cos, 0) (Hessel et al. 2021, arXiv 2104.08718): (B, D) -> (B,)."""
        text_features = self.texts([self.prefix + caption for caption in captions])
        return 2.5 * (image_features * text_features).sum(-1).clamp(min=0)


class AestheticScorer:
    """How good an image looks: a linear head on the features of a `ClipScorer` (as LAION's)."""
    def __init__(self, path, clip):
        tensors = common.read_weights(path, f"--scorer {path}")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()
                  if tensor.isfinite().all()}
        if shapes != {"weight": (1, clip.dim), "bias": (1,)}:
            raise UserError(f"--scorer {path} is not a linear head on the features of {clip.path}: "
                            f"expected weight (1, {clip.dim}) and bias (1,), without nan")
        self.clip = clip
        self.weight = tensors["weight"][0].float().to(clip.device)
        self.bias = tensors["bias"].float().to(clip.device)

    def __call__(self, images, batch_size=256):
        """uint8 (N, H, W, 3) -> (N,)"""
        parts = torch.as_tensor(images).split(batch_size)
        return torch.cat([self.clip.images(part) @ self.weight + self.bias for part in parts])
