"""Small stand-ins for the experts that the papers download, trained on the toy world and saved in the Hugging Face format.

`clip()` is the tiny CLIP (for openai/clip-vit-large-patch14): English only, 20 tokens at most. It learns from the captions of the
training scenes by the contrastive loss of CLIP (Radford et al. 2021), nothing else, and shows CLIP's known weakness: it tells
colours and shapes apart, and hardly relations.

    folder = clip()                            # trains it on first need (40 s on two cores), then only returns the folder
    CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    python -m toy.experts                      # builds all and prints what each can do
"""
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import CaptionedImages, autocast, batches, pick_device, pick_precision
from toy import shapes, tellings

CLIP_FOLDER = Path("runs/toy/clip")
SPECIAL = ["<|pad|>", "<|unknown|>", "<|start|>", "<|end|>"]           # <|end|> must not be 2: transformers then pools at the largest id
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's own normalisation of pixels
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
LENGTH = 20                                                             # tokens that the tiny CLIP reads


def train_tokenizer(texts, vocabulary=800, length=LENGTH):
    """A byte-level BPE tokenizer (any text can be encoded) that writes <|start|> ... <|end|>; padding is <|pad|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 2), ("<|end|>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", unk_token="<|unknown|>", bos_token="<|start|>",
                                   eos_token="<|end|>", model_max_length=length)


def clip(data="data/shapes", folder=CLIP_FOLDER, steps=400, batch=192, seed=0):
    """The folder of the tiny CLIP; trains and saves it if it is not there. An interrupted build leaves nothing."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
    start = time.time()
    print(f"training the tiny CLIP, the stand-in for openai/clip-vit-large-patch14, into {folder}/ (once, under a minute on two cores)")
    dataset = CaptionedImages(data, "train", 24)
    # the tokenizer has whole words for narrative prompts too, as CLIP's has for all of the web; the model never reads them
    rng = random.Random(seed)
    told = [tellings.narrative(shapes.Scene.from_json(image["scene"]), rng) for _, _, image in dataset.items]
    tokenizer = train_tokenizer([*(text for _, texts, _ in dataset.items for text in texts), *told])
    config = CLIPConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=2, eos_token_id=3),
        vision_config=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8),
        projection_dim=128, logit_scale_init_value=2.6592)
    torch.manual_seed(seed)
    device = pick_device()
    precision = pick_precision("auto", device)
    # the fused kernel is slow on CPUs at such short sequences
    model = CLIPModel._from_config(config, attn_implementation="eager" if device.type == "cpu" else "sdpa").to(device)
    # Embeddings as large as what the layers add to them: with CLIP's own 0.02 the states of the last layer forget which word stood where.
    # A small transformer trained on them told "a above b" from "b above a" in 51 % of cases after 1000 steps; with 0.5 in 96 % after 600.
    for embedding in (model.text_model.embeddings.token_embedding, model.text_model.embeddings.position_embedding):
        torch.nn.init.normal_(embedding.weight, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    mean, std = MEAN.to(device), STD.to(device)
    with tqdm(batches(dataset, batch, 0, steps, seed), desc="tiny CLIP", unit="step") as progress:
        for pictures, texts, _ in progress:
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
            pixels = (pictures.to(device).float() / 255 - mean) / std
            with autocast(device, precision):
                logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels).logits_per_image.float()
            target = torch.arange(len(texts), device=device)
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=4.6052)                    # a temperature of at least 1/100, as in CLIP
            progress.set_postfix(loss=f"{loss.item():.2f}")
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    try:
        model.to("cpu").save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(unfinished)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"the tiny CLIP took {time.time() - start:.0f} s")
    return folder


@torch.no_grad()
def clip_accuracy(folder=CLIP_FOLDER, data="data/shapes", samples=512, seed=0):
    """How often, in %, the tiny CLIP puts a picture's own caption above one with a single field changed: {field: percent}."""
    from transformers import AutoTokenizer, CLIPModel
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    dataset, rng = CaptionedImages(data, "val", 24), random.Random(seed)
    chosen = [(i, shapes.Scene.from_json(item[2]["scene"])) for i, item in enumerate(dataset.items) if item[2]["scene"]["relation"]][:samples]
    pixels = (torch.stack([dataset.picture(i) for i, _ in chosen]).float() / 255 - MEAN) / STD

    def embed(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    right = embed([shapes.sentence(scene, rng) for _, scene in chosen])
    table = {}
    for field in shapes.FIELDS[:4]:
        wrong = embed([shapes.sentence(shapes.change_field(scene, field, rng), rng) for _, scene in chosen])
        table[field] = 100 * ((image * right).sum(-1) > (image * wrong).sum(-1)).float().mean().item()
    return table


if __name__ == "__main__":
    shapes.build()
    clip()
    print("tiny CLIP, a caption against one with a field changed:", {field: f"{value:.1f} %" for field, value in clip_accuracy().items()})
