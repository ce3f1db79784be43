"""Small stand-ins for the models that the papers download, trained on the toy world.

`clip()` stands for openai/clip-vit-large-patch14. It learns from the captions of training scenes
with CLIP's contrastive loss (Radford et al. 2021), and reads English only, 20 tokens of it. It has
CLIP's known weakness: it tells colours and shapes apart, but hardly relations.
`llm()` stands for Llama, Qwen and Vicuna. It predicts the next token of `language.corpus_line`:
four languages, paragraphs and common-sense facts, 256 tokens at a time. It has never seen an image.
`instructed_llm()` stands for Vicuna and other chat models. It is `llm()`, trained further to say
what a narrative means when it reads "in plain words:".
`scorer()` stands for the aesthetic predictor of LAION: a linear head on the tiny CLIP that tells
how good an image is.
`captioner()` stands for Salesforce/blip2-opt-2.7b. It describes an image in plain English.
`segmenter()` stands for SAM with a semantic branch. It gives each pixel its colour and shape.

Each function trains its model, if it is not there, and returns its folder, in the Hugging Face
format. The same classes of transformers load them and the real models: CLIPModel, LlamaForCausalLM,
AutoModelForImageTextToText and AutoModelForSemanticSegmentation.
"""
import itertools
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from tqdm import tqdm

import common
import encoders
from common import autocast
from image_data import CaptionedImages, batches
from toy import language, shapes
from toy.shapes import Scene, atomic_folder

CLIP_FOLDER = Path("runs/toy/clip")
LLM_FOLDER = Path("runs/toy/llm")
INSTRUCTED_FOLDER = Path("runs/toy/llm_instructed")
CAPTIONER_FOLDER = Path("runs/toy/captioner")
SEGMENTER_FOLDER = Path("runs/toy/segmenter")
SCORER = "runs/toy/quality.safetensors"
SIZE = 24                    # pixels that the image models see
LENGTH = 20                  # tokens that the tiny CLIP reads, and the tiny captioner writes
CONTEXT = 256                # tokens that the tiny LLM reads
# CLIP's own normalisation of pixels
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
# <|end|> must not be number 2: transformers would pool a CLIP's text at its largest token
SPECIAL = ["<|pad|>", "<|unknown|>", "<|start|>", "<|end|>"]
TOKENS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)


# ---------------------------------------------------------------------------- shared by the models
def is_trained(folder, name, original):
    """True if a model was trained before; if not, says that it is trained now."""
    if (Path(folder) / "config.json").exists():
        return True
    print(f"training the tiny {name}, a stand-in for {original}, into {folder}/ "
          "(once, one to three minutes on two cores)")
    return False


def save(folder, *parts):
    """Saves a model with its tokenizer or processors, whole or not at all; returns the folder."""
    with atomic_folder(folder) as unfinished:
        for part in parts:
            part.save_pretrained(unfinished)
    return folder


def train_tokenizer(texts, vocabulary=800, length=LENGTH, template="<|start|> $A <|end|>"):
    """A byte-level BPE tokenizer, which can encode any text; `template`: the tokens it writes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|start|>", 2), ("<|end|>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unknown|>",
        bos_token="<|start|>", eos_token="<|end|>", model_max_length=length)


def train_words(data, size, folder, keep):
    """Writes <folder>/words, a tokenizer of the captions for `TextEncoder`; returns its path.

    keep: leave the existing one.
    """
    path = Path(folder) / "words"
    if not keep:
        items = CaptionedImages(data, "train", size).items
        captions = [caption for _, texts, _ in items for caption in texts]
        tokenizer = train_tokenizer(captions, vocabulary=2048)
        ids = tokenizer(captions, verbose=False).input_ids
        tokenizer.model_max_length = max(len(row) for row in ids)
        tokenizer.save_pretrained(path)
    return str(path)


def new_model(model_class, config, seed):
    """A model with random weights, the device where it is, and the precision that is fast there."""
    torch.manual_seed(seed)
    device = common.pick_device()
    precision = common.pick_precision("auto", device)
    model = model_class._from_config(
        config, attn_implementation=encoders.attention_kernel(device))
    return model.to(device), device, precision


def muon_and_adamw(model, precision, *layers, rate=1.0):
    """The optimizers of a model: Muon for the matrices of these layers, AdamW for all the rest.

    precision: of Muon's matrix products. rate: factor for both learning rates.
    """
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    in_muon = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in in_muon]
    return [common.Muon(matrices, precision, lr=0.02 * rate, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=3e-3 * rate, betas=(0.9, 0.98), fused=True)]


class Trainer:
    """Updates a model. Learning rates rise for a tenth of the steps, then fall to nothing.

    cycle_momentum: the first beta of AdamW falls from 0.95 to 0.85 and rises again meanwhile.
    """
    def __init__(self, name, model, optimizers, steps, cycle_momentum=False):
        self.model = model
        self.optimizers = optimizers
        self.schedules = [torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.defaults["lr"], total_steps=steps, pct_start=0.1,
            cycle_momentum=cycle_momentum) for optimizer in optimizers]
        self.progress = tqdm(total=steps, desc=name, unit="step")

    def update(self, loss):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules):
            optimizer.step()
            schedule.step()
        self.progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
        self.progress.update()
        if self.progress.n == self.progress.total:
            self.progress.close()


def scenes_of(dataset):
    """The scene of each image of the toy world."""
    return [Scene.from_json(annotation["scene"]) for _, _, annotation in dataset.items]


def normalise(images):
    """Images (B, 3, S, S) in [0, 1], as CLIP takes them."""
    return (images - MEAN.to(images.device)) / STD.to(images.device)


def augment(images):
    """Images (B, 3, S, S) in [0, 1], each with some blur and noise, as a generator's may have."""
    blur, noise = torch.rand(2, len(images), 1, 1, 1, device=images.device)
    around = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return torch.lerp(images, around, 0.7 * blur) + 0.08 * noise * torch.randn_like(images)


# -------------------------------------------------------------------------------------------- CLIP
def clip(data="data/shapes", folder=CLIP_FOLDER, steps=400, batch_size=192, seed=0):
    """The folder of the tiny CLIP, which is trained if it is not there."""
    if is_trained(folder, "CLIP", "openai/clip-vit-large-patch14"):
        return folder
    dataset = CaptionedImages(data, "train", SIZE)
    # the tokenizer has whole words for narratives too, as CLIP's has for the whole web, although
    # the model never reads them
    rng = random.Random(seed)
    narratives = [language.narrative(scene, rng) for scene in scenes_of(dataset)]
    captions = [caption for _, captions, _ in dataset.items for caption in captions]
    tokenizer = train_tokenizer([*captions, *narratives])
    size = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    text = dict(num_hidden_layers=2, max_position_embeddings=LENGTH, vocab_size=len(tokenizer))
    vision = dict(num_hidden_layers=3, image_size=SIZE, patch_size=8)
    config = transformers.CLIPConfig(
        text_config=size | text | TOKENS, vision_config=size | vision,
        projection_dim=128, logit_scale_init_value=2.6592)
    model, device, precision = new_model(transformers.CLIPModel, config, seed)
    # Embeddings as large as what the layers add to them: with CLIP's own 0.02 the last layer's
    # states forget which word stood where. A small transformer trained on them told "a above b"
    # from "b above a" in 51 % of cases after 1000 steps; with 0.5 in 96 % after 600.
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.5)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98),
                                  weight_decay=0.1, fused=True)
    trainer = Trainer("tiny CLIP", model, [optimizer], steps, cycle_momentum=True)
    for images, captions in batches(dataset, batch_size, 0, steps, seed):
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)     # a temperature of at least 1/100, as in CLIP
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        pixels = normalise(images.to(device).float() / 255)
        with autocast(device, precision):
            logits = model(**tokens, pixel_values=pixels).logits_per_image.float()       # (B, B)
        target = torch.arange(len(captions), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        trainer.update(loss)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    return save(folder, model, tokenizer, processor)


@torch.no_grad()
def scorer(data="data/shapes", clip_folder=CLIP_FOLDER, path=SCORER):
    """The file of the quality scorer, which is fitted if it is not there. Needs the tiny CLIP.

    "weight" (1, D) and "bias" (1,) of a linear function of image features of length 1, by ridge
    regression on the split "quality". The rank correlation on a held-out tenth of it is printed.
    """
    if Path(path).exists():
        return path
    dataset = CaptionedImages(shapes.build_quality(data), "quality", SIZE)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    images = torch.stack([dataset.image(i) for i in range(len(dataset))])
    features = []
    for part in images.split(512):
        outputs = model.get_image_features(pixel_values=normalise(part.float() / 255))
        features.append(F.normalize(outputs.pooler_output, dim=-1))
    x = torch.cat(features).double()                                                     # (N, D)
    y = torch.tensor([annotation["quality"] for _, _, annotation in dataset.items]).double()
    n_held_out = len(dataset) // 10
    x_mean = x[n_held_out:].mean(0)
    y_mean = y[n_held_out:].mean()
    a = x[n_held_out:] - x_mean
    b = y[n_held_out:] - y_mean
    weight = torch.linalg.solve(a.T @ a + 0.1 * torch.eye(x.shape[1]), a.T @ b)
    bias = y_mean - x_mean @ weight
    common.save_tensors({"weight": weight[None].float(), "bias": bias[None].float()}, path)
    ranks = [v[:n_held_out].argsort().argsort().double() for v in (x @ weight, y)]
    correlation = torch.corrcoef(torch.stack(ranks))[0, 1]
    print(f"the quality scorer, on held-out images: rank correlation {correlation:.3f}")
    return path


# --------------------------------------------------------------------------------------------- LLM
def endless_lines(scenes, rng, line_of):
    """Yields line_of(scene, rng) for all scenes, again and again, each time in a new order."""
    while True:
        for scene in rng.sample(scenes, len(scenes)):
            yield line_of(scene, rng)


def token_batches(lines, tokens, rng):
    """Yields batches of lines, as lists of token ids; with padding a batch has at most `tokens`.

    Lines of similar length come together, batches in random order.
    """
    batch = []
    while True:
        pool = sorted([*batch, *itertools.islice(lines, 2048)], key=len)
        ready = []
        batch = []
        for line in pool:
            if batch and (len(batch) + 1) * len(line) > tokens:
                ready.append(batch)
                batch = []
            batch.append(line)                       # a batch that is not full starts the next pool
        yield from rng.sample(ready, len(ready))


def llm(data="data/shapes", folder=LLM_FOLDER, steps=1700, tokens=1536, seed=0):
    """The folder of the tiny LLM, which is trained if it is not there. tokens: in a batch."""
    if is_trained(folder, "LLM", "Llama, Qwen and Vicuna"):
        return folder
    rng = random.Random(seed)
    scenes = scenes_of(CaptionedImages(data, "train", SIZE))
    lines = endless_lines(scenes, rng, language.corpus_line)
    tokenizer = train_tokenizer(itertools.islice(lines, 20_000), 1200, CONTEXT, "<|start|> $A")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        **TOKENS)
    model, _, precision = new_model(transformers.LlamaForCausalLM, config, seed)
    # To score a label the model must look it up in the caption. That is learned late and suddenly,
    # after some 700 steps, and needs large embeddings, which outputs are also compared with, and
    # layers that do nothing at first.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    nn.init.constant_(model.model.norm.weight, 0.1)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)

    optimizers = muon_and_adamw(model, precision, model.model.layers)
    trainer = Trainer("tiny LLM", model, optimizers, steps)
    predict_next_tokens(trainer, tokenizer, lines, steps, tokens, rng, precision)
    return save(folder, model, tokenizer)


def predict_next_tokens(trainer, tokenizer, lines, steps, tokens, rng, precision):
    """Trains an LLM for some steps on lines of text; tokens: in a batch."""
    model = trainer.model
    device = model.device
    encoded = ((tokenizer(line).input_ids + [tokenizer.eos_token_id])[:CONTEXT] for line in lines)
    for batch in itertools.islice(token_batches(encoded, tokens, rng), steps):
        x = nn.utils.rnn.pad_sequence([torch.tensor(line) for line in batch], batch_first=True,
                                      padding_value=-1).to(device)                       # (B, L)
        x = F.pad(x, (0, -x.shape[1] % 8), value=-1)            # few different shapes are faster
        with autocast(device, precision):                       # causal: end padding is harmless
            logits = model(input_ids=x.clamp(min=0)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten(),
                               ignore_index=-1)
        trainer.update(loss)


def instructed_llm(data="data/shapes", folder=INSTRUCTED_FOLDER, llm_folder=LLM_FOLDER, steps=300,
                   tokens=1536, seed=0):
    """The folder of the tiny instructed LLM, which is trained if it is not there.

    It continues from the tiny LLM with `language.instructed_line`. The tiny LLM itself puts 3 of 10
    narratives correctly into plain words: of two groups it names one twice. tokens: in a batch.
    """
    llm(data, llm_folder)
    if is_trained(folder, "instructed LLM", "Vicuna"):
        return folder
    rng = random.Random(seed)
    scenes = scenes_of(CaptionedImages(data, "train", SIZE))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm_folder)
    device = common.pick_device()
    model = transformers.LlamaForCausalLM.from_pretrained(
        llm_folder, attn_implementation=encoders.attention_kernel(device))
    precision = common.pick_precision("auto", device)
    model = model.to(device).train()
    optimizers = muon_and_adamw(model, precision, model.model.layers, rate=0.5)
    trainer = Trainer("tiny instructed LLM", model, optimizers, steps)
    lines = endless_lines(scenes, rng, language.instructed_line)
    predict_next_tokens(trainer, tokenizer, lines, steps, tokens, rng, precision)
    return save(folder, model, tokenizer)


# --------------------------------------------------------------------------------------- captioner
def captioner(data="data/shapes", folder=CAPTIONER_FOLDER, steps=1000, batch_size=64, seed=0):
    """The folder of the tiny captioner, which is trained if it is not there.

    It learns one wording, `language.plain`, in which the upper or left group comes first. From
    captions in all wordings, relations were still guesses after 900 steps; in this one, count,
    colour, shape and relation are 99 % right after 1000.
    """
    if is_trained(folder, "captioner", "Salesforce/blip2-opt-2.7b"):
        return folder
    items = CaptionedImages(data, "train", SIZE).items
    tokenizer = train_tokenizer([caption for _, captions, _ in items for caption in captions])
    plain_items = [(path, [language.plain(Scene.from_json(annotation["scene"]))], annotation)
                   for path, _, annotation in items]
    dataset = CaptionedImages(data, "train", SIZE, items=plain_items)
    # BLIP's own initial range, 1e-10, is for weights that are loaded; its captions end with [SEP]
    size = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4,
                initializer_range=0.02)
    text = dict(num_hidden_layers=2, max_position_embeddings=64, vocab_size=len(tokenizer),
                sep_token_id=TOKENS["eos_token_id"])
    vision = dict(num_hidden_layers=3, image_size=SIZE, patch_size=8)
    config = transformers.BlipConfig(text_config=size | text | TOKENS, vision_config=size | vision)
    model, device, precision = new_model(transformers.BlipForConditionalGeneration, config, seed)
    image_layers = model.vision_model.encoder
    text_layers = model.text_decoder.bert.encoder
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.5)
    for layer in image_layers.layers:                # as in the LLM, they do nothing at first
        nn.init.zeros_(layer.self_attn.projection.weight)
        nn.init.zeros_(layer.mlp.fc2.weight)
    for layer in text_layers.layer:
        nn.init.zeros_(layer.attention.output.dense.weight)
        nn.init.zeros_(layer.crossattention.output.dense.weight)
        nn.init.zeros_(layer.output.dense.weight)

    optimizers = muon_and_adamw(model, precision, image_layers, text_layers)
    trainer = Trainer("tiny captioner", model, optimizers, steps)
    for images, captions in batches(dataset, batch_size, 0, steps, seed):
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        tokens = tokens.input_ids.to(device)
        labels = tokens.masked_fill(tokens == TOKENS["pad_token_id"], -100)
        pixels = normalise(augment(images.to(device).float() / 255))
        with autocast(device, precision):
            loss = model(pixel_values=pixels, input_ids=tokens, labels=labels).loss
        trainer.update(loss)
    processor = transformers.BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return save(folder, model, transformers.BlipProcessor(processor, tokenizer))


# --------------------------------------------------------------------------------------- segmenter
def label_map(things, size, fine=8):
    """The label at each pixel's centre, uint8 (size, size): 0 is background, i COCO's category i.

    things: annotations of instances_*.json. Their polygons are drawn `fine` times as large, since
    Pillow paints every pixel that a border touches.
    """
    canvas = Image.new("L", (fine * size, fine * size))
    draw = ImageDraw.Draw(canvas)
    for thing in things:
        for polygon in thing["segmentation"]:
            draw.polygon([fine * v for v in polygon], fill=thing["category_id"])
    return np.array(canvas)[fine // 2::fine, fine // 2::fine]


class LabelledImages(CaptionedImages):
    """Images with a label map as the fourth channel: uint8 (4, S, S), at their own size S.

    `names` are the names of the labels.
    """
    def __init__(self, root, split, size):
        super().__init__(root, split, size)
        instances = common.read_json(Path(root) / "annotations" / f"instances_{split}2017.json")
        self.names = ["background", *(category["name"] for category in instances["categories"])]
        self.things = {}                             # of each image, by its id
        for thing in instances["annotations"]:
            self.things.setdefault(thing["image_id"], []).append(thing)

    def image(self, i):
        labels = label_map(self.things[self.items[i][2]["id"]], self.size)
        return torch.cat([super().image(i), torch.from_numpy(labels)[None]])


def segmenter(data="data/shapes", folder=SEGMENTER_FOLDER, steps=400, batch_size=64, seed=0):
    """The folder of the tiny segmenter, which is trained if it is not there."""
    if is_trained(folder, "segmenter", "SAM with a semantic branch"):
        return folder
    dataset = LabelledImages(data, "train", SIZE)
    config = transformers.SegformerConfig(
        num_encoder_blocks=3, depths=[1, 1, 1], hidden_sizes=[32, 64, 128],
        patch_sizes=[3, 3, 3], strides=[1, 2, 2], sr_ratios=[4, 2, 1],
        num_attention_heads=[1, 2, 4], mlp_ratios=[2, 2, 2], decoder_hidden_size=64,
        drop_path_rate=0.0, classifier_dropout_prob=0.0,
        id2label=dict(enumerate(dataset.names)),
        label2id={name: i for i, name in enumerate(dataset.names)})
    segformer = transformers.SegformerForSemanticSegmentation
    model, device, precision = new_model(segformer, config, seed)

    optimizers = muon_and_adamw(model, precision, model.segformer.stages)
    trainer = Trainer("tiny segmenter", model, optimizers, steps)
    for images, _ in batches(dataset, batch_size, 0, steps, seed):
        images, labels = images.to(device).split([3, 1], dim=1)
        pixels = normalise(augment(images.float() / 255))
        with autocast(device, precision):
            logits = model(pixel_values=pixels).logits                       # (B, labels, S, S)
        trainer.update(F.cross_entropy(logits.float(), labels[:, 0].long()))
    processor = transformers.SegformerImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        image_mean=MEAN.flatten().tolist(), image_std=STD.flatten().tolist())
    return save(folder, model, processor)
