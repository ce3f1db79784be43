"""An LLM as text encoder: what it reads, what the adapter makes of it, what each stage trains, and a training from end to end."""
import copy
import dataclasses
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_coco, run
from safetensors.torch import load_file
from test_training import TINY, refused

import common
import llm_adapter
import sample
from autoencoder import Autoencoder, Latents
from common import CachedLLM, LLMEncoder, UserError
from llm_adapter import AdaptedEncoder, Adapter, Settings, best_pictures, cos_len, pair_batches, read_pairs
from toy import shapes, tellings
from toy.shapes import OPPOSITE, Group, Scene

TEXTS = ["two red circles above a blue square", "", "a man on a horse", "三个 circles, drei Kreise и 🟢"]
SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
DECODER = SMALL | dict(num_key_value_heads=1, max_position_embeddings=64)
T5 = dict(vocab_size=300, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2)
KINDS = {                                                                # class of transformers: settings, what its tokenizer writes
    "LlamaForCausalLM": (DECODER, "<|start|> $A"), "Qwen2ForCausalLM": (DECODER, "$A"),
    "Gemma2ForCausalLM": (DECODER | dict(head_dim=16, sliding_window=16), "<|start|> $A"), "T5ForConditionalGeneration": (T5, "$A <|end|>"),
    "T5EncoderModel": (T5, "$A <|end|>"), "BertForMaskedLM": (SMALL | dict(max_position_embeddings=64), "<|start|> $A <|end|>")}


def save_llm(folder, kind, seed=0, template=None, pad=True):
    """A language model of random weights with a tokenizer of its own, saved as a real one is; returns its folder."""
    import transformers

    from toy.experts import train_tokenizer
    settings, usual = KINDS[kind]
    model = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = model(model.config_class(**settings))
    for parameter in model.parameters():                                 # at the usual 0.02 attention would be too even to notice anything
        parameter.data += 0.2 * torch.randn_like(parameter)
    tokenizer = train_tokenizer(["two red circles above a blue square", "a man on a horse"], 300, 64, template or usual)
    if not pad:
        tokenizer.pad_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return {kind: save_llm(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def llama(llms):
    return llms["LlamaForCausalLM"]


def randomized(model):
    """With every parameter at random: a new adapter's blocks do nothing yet that a test could see."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def adapter_of(dim=32, length=6, text_dim=16, **change):
    torch.manual_seed(1)
    return randomized(Adapter(Settings(width=32, heads=2, **change), dim, length, text_dim))


# ---------------------------------------------------------------------------------------------------- what the LLM reads
@pytest.mark.parametrize("kind", KINDS)
def test_an_llm_gives_its_states_for_each_token(llms, kind):
    encoder = LLMEncoder(llms[kind])
    ids = encoder.tokenizer(TEXTS).input_ids
    lengths = [max(1, len(row)) for row in ids]
    features, mask = encoder(TEXTS)
    assert features.shape == (4, max(lengths), 32) == (4, max(lengths), encoder.dim) and features.dtype == torch.float32
    assert torch.equal(mask, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    assert torch.allclose(features[0, :lengths[0]], encoder.model(torch.tensor(ids[:1])).last_hidden_state[0], atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_does_not_depend_on_the_batch(llms, kind):
    encoder = LLMEncoder(llms[kind])
    features, mask = encoder(TEXTS)
    for i, text in enumerate(TEXTS):
        alone, all_real = encoder([text])
        assert all_real.all() and torch.allclose(features[i][mask[i]], alone[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_count_from_the_embeddings_to_the_last(llms, kind):
    at = {layer: LLMEncoder(llms[kind], layer) for layer in (-3, -1, 0, 1, 2)}
    features = {layer: encoder(TEXTS[:1])[0] for layer, encoder in at.items()}
    assert torch.equal(features[0], features[-3]) and torch.equal(features[2], features[-1])
    assert not torch.allclose(features[0], features[1], atol=0.01) and not torch.allclose(features[1], features[2], atol=0.01)
    if "Bert" not in kind:                                               # whose embeddings have places added
        words = at[0].model.get_input_embeddings()(torch.tensor(at[0].tokenizer(TEXTS[:1]).input_ids))
        assert torch.nn.functional.cosine_similarity(features[0], words, dim=-1).min() > 0.999


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(llama, layer):
    with pytest.raises(UserError, match=f"--llm-layer {layer}: .* 0 .* to 2"):
        LLMEncoder(llama, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_is_read_and_cut_off_again(llms, kind):
    # the mark at the beginning goes with the instruction; a text behind it begins with a space to all tokenizers but Qwen's
    text, begin, instruction = "two red circles", KINDS[kind][1].startswith("<|start|>"), "what is seen in it:" + ("\n" if "Qwen" in kind else " ")
    (plain, _), (told, mask) = (LLMEncoder(llms[kind], instruction=words)([text]) for words in ("", instruction))
    assert mask.all() and told.shape == plain[:, begin:].shape
    assert (told - plain[:, begin:]).abs().amax(-1).min() > 0.01                       # every token has read it
    if "T5" in kind:                                                                   # without places: the same words, the same embeddings
        (plain, _), (told, _) = (LLMEncoder(llms[kind], 0, instruction=words)([text]) for words in ("", instruction))
        assert torch.equal(told, plain)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForCausalLM", "T5ForConditionalGeneration"])
def test_of_an_instruction_alone_one_token_stays(llms, kind):
    features, mask = LLMEncoder(llms[kind], instruction="describe:")([""])
    assert features.shape == (1, 1, 32) and mask.all() and features.isfinite().all()


def test_a_tokenizer_without_padding_serves(tmp_path, llama):
    padless = LLMEncoder(save_llm(tmp_path / "llm", "LlamaForCausalLM", pad=False))
    assert padless.tokenizer.pad_token_id is None and LLMEncoder(llama).tokenizer.pad_token_id is not None
    (features, mask), (expected, real) = padless(TEXTS), LLMEncoder(llama)(TEXTS)
    assert torch.equal(mask, real) and torch.allclose(features[mask], expected[mask], atol=1e-5)


def test_an_empty_prompt_of_no_tokens_is_read_as_one(llms):
    encoder = LLMEncoder(llms["Qwen2ForCausalLM"])
    assert encoder.tokenizer([""]).input_ids == [[]]
    features, mask = encoder(["", ""])
    assert features.shape == (2, 1, 32) and mask.all() and features.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_script_is_read_and_told_apart(llms, kind):
    texts = ["👩‍🚀", "👩‍🚒", "三个绿色的圆", "三個綠色的圓", "три круга", "ثلاث دوائر", "วงกลม", "e\u0301", "a\u2028b\x00c", " ", "\ufeff"]
    features, mask = LLMEncoder(llms[kind])(texts)
    assert features.isfinite().all() and mask.any(1).all()
    assert len({row[real].numpy().tobytes() for row, real in zip(features, mask)}) == len(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_beyond_the_context_is_cut_with_one_warning(llms, kind, capsys):
    encoder = LLMEncoder(llms[kind])
    assert encoder.length == 64
    features, mask = encoder(["horse " * 100, "a man", "horse " * 90])
    assert features.shape == (3, 64, 32) and mask.sum(1)[[0, 2]].tolist() == [64, 64] and encoder.cut == 2
    encoder(["horse " * 80])
    assert encoder.cut == 3 and capsys.readouterr().out.count("cut off") == 1
    features, mask = LLMEncoder(llms[kind], instruction="horse " * 90)(["a man"])
    assert features.shape == (1, 1, 32) and mask.all()                                 # no room for the prompt, but no crash


def test_identity_is_of_weights_layer_and_instruction(tmp_path, llama):
    same = [LLMEncoder(llama), LLMEncoder(llama, 2), LLMEncoder(llama, dtype=torch.bfloat16), LLMEncoder(shutil.copytree(llama, tmp_path / "copy"))]
    other = [LLMEncoder(llama, 1), LLMEncoder(llama, instruction="a"), LLMEncoder(save_llm(tmp_path / "llm", "LlamaForCausalLM", seed=1))]
    assert next(same[2].model.parameters()).dtype == torch.bfloat16 and same[2](TEXTS)[0].dtype == torch.float32
    assert len({encoder.identity for encoder in same}) == 1
    assert len({encoder.identity for encoder in (same[0], *other)}) == 4


def reading(monkeypatch, interrupt_at=None):
    """Notes what LLMs are given to read from now on; the call of number `interrupt_at` meets a Ctrl-C."""
    read, calls = LLMEncoder.__call__, []

    def noting(self, texts):
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        calls.append(texts)
        return read(self, texts)
    monkeypatch.setattr(LLMEncoder, "__call__", noting)
    return calls


@pytest.mark.parametrize("kind, instruction", [("LlamaForCausalLM", ""), ("LlamaForCausalLM", "what is seen in it: "), ("Qwen2ForCausalLM", "")])
def test_states_that_were_kept_are_those_of_the_llm(llms, tmp_path, monkeypatch, kind, instruction):
    encoder = LLMEncoder(llms[kind], instruction=instruction)
    cached = CachedLLM(encoder, [*TEXTS, "horse " * 100, TEXTS[0]], tmp_path / "features", batch=2)
    expected = {texts: encoder(list(texts)) for texts in ((TEXTS[2], "", TEXTS[3], TEXTS[2]), ("horse " * 100,))}
    calls = reading(monkeypatch)
    for texts, (features, mask) in expected.items():
        kept, real = cached(list(texts))
        assert torch.equal(real, mask) and kept.dtype == torch.float32
        assert torch.allclose(kept[real], features[mask], atol=0.01) and (kept[~real] == 0).all()
    assert not calls and (cached.dim, cached.device) == (encoder.dim, encoder.device)
    assert torch.equal(cached([TEXTS[0], "another"])[0], encoder([TEXTS[0], "another"])[0]) and len(calls) == 2
    CachedLLM(encoder, reversed(["horse " * 100, *TEXTS]), tmp_path / "features")
    assert len(calls) == 2                                                             # they are still there
    for other, texts in ((LLMEncoder(llms[kind], 1), [*TEXTS, "horse " * 100]), (encoder, TEXTS)):
        with pytest.raises(UserError, match="--features"):
            CachedLLM(other, texts, tmp_path / "features")


def test_reading_that_was_interrupted_goes_on(llama, tmp_path, monkeypatch):
    encoder, texts = LLMEncoder(llama), [f"{'two ' * (i % 3)}circles {i}" for i in range(10)]
    whole = CachedLLM(encoder, texts, tmp_path / "whole", batch=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        reading(patch, interrupt_at=2)
        CachedLLM(encoder, texts, tmp_path / "parts", batch=3)
    calls = reading(monkeypatch)
    parts = CachedLLM(encoder, texts, tmp_path / "parts", batch=3)
    assert [len(texts) for texts in calls] == [3, 1] and np.array_equal(whole.rows, parts.rows)


def break_llm(folder, how):
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how.startswith("no "):
        (folder / how[3:]).unlink()
    elif how.startswith("half "):
        (folder / how[5:]).write_bytes((folder / how[5:]).read_bytes()[:(folder / how[5:]).stat().st_size // 2])
    elif how.startswith("nothing in "):
        (folder / how[11:]).write_bytes(b"")
    elif how == "a layer less than its config says":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize("how", ["missing", "empty", "no tokenizer", "no config.json", "no model.safetensors", "half config.json",
                                 "half model.safetensors", "half tokenizer.json", "half tokenizer_config.json", "nothing in config.json",
                                 "nothing in model.safetensors", "nothing in tokenizer.json", "a layer less than its config says"])
def test_a_broken_llm_is_refused_in_one_line(tmp_path, llama, how):
    folder = Path(shutil.copytree(llama, tmp_path / "llm"))
    LLMEncoder(folder)
    break_llm(folder, how)
    with pytest.raises(UserError) as error:
        LLMEncoder(folder)
    assert str(error.value).startswith(f"--llm {folder}") and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- the adapter
@pytest.mark.parametrize("change", [{}, dict(encoder_blocks=0), dict(adapter="mlp")])
def test_padding_does_not_change_the_output(change):
    adapter, g = adapter_of(**change), torch.Generator().manual_seed(0)
    h, mask = torch.randn(3, 7, 32, generator=g), torch.arange(7) < torch.tensor([[2], [7], [4]])
    y, present, _ = adapter(h, mask)
    seen = present > 0 if change.get("adapter") == "mlp" else torch.ones_like(present, dtype=torch.bool)       # mlp: padding stays padding
    longer = torch.nn.functional.pad(h, (0, 0, 0, 3), value=3.0), torch.nn.functional.pad(mask, (0, 3))
    for other in (torch.where(mask[..., None], h, 7 * torch.randn(h.shape, generator=g)), mask), longer:
        y_other, present_other, _ = adapter(*other)
        assert torch.allclose(y[seen], y_other[seen], atol=1e-5) and torch.allclose(present, present_other, atol=1e-5)
    assert not torch.allclose(y, adapter(h + mask[..., None] * torch.randn(h.shape, generator=g), mask)[0], atol=1e-2)


def test_without_the_mask_padding_changes_the_output():
    adapter, g = adapter_of(mask=False), torch.Generator().manual_seed(0)
    h, mask = torch.randn(3, 7, 32, generator=g), torch.arange(7) < torch.tensor([[2], [7], [4]])
    changed = (adapter(h, mask)[0] - adapter(torch.where(mask[..., None], h, torch.randn(h.shape, generator=g)), mask)[0]).abs().amax((1, 2))
    assert changed[[0, 2]].min() > 0.01 and changed[1] == 0


@pytest.mark.parametrize("instruction", ["", "what is seen in it: "])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_one_prompt_does_not_depend_on_its_batch(llms, kind, instruction):
    read, adapter = LLMEncoder(llms[kind], instruction=instruction), adapter_of()
    encoder = AdaptedEncoder(read, adapter, False, torch.float32)
    y, mask = encoder(TEXTS)
    assert y.shape == (4, encoder.length, encoder.dim) == (4, 6, 16) and mask.shape == (4, 6)
    assert (y[0] - y[1]).abs().max() > 0.01
    for i, text in enumerate(TEXTS):                                     # at the seam with an instruction not all texts are cut at the same token
        alone, real = encoder([text])
        assert torch.allclose(y[i], alone[0], atol=1e-4) and torch.equal(mask[i], real[0])
    adapter.use_mask = False
    assert not torch.allclose(encoder(TEXTS)[0][2], encoder([TEXTS[2]])[0][0], atol=1e-3)


def test_padding_stands_at_the_end_and_never_everywhere():
    class Says(torch.nn.Module):
        out, length, logits = SimpleNamespace(out_features=16), 4, torch.tensor([[1.0, 2, -1, 3], [-1, 1, 1, 1], [1, 1, 1, 1]])

        def forward(self, h, mask):
            return torch.zeros(3, 4, 16), self.logits, None

    def read(texts):
        return None, None
    read.device = torch.device("cpu")
    y, mask = AdaptedEncoder(read, Says(), False, torch.float32)(["a", "b", "c"])
    assert mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert AdaptedEncoder(read, Says(), True, torch.float32)(["a", "b", "c"])[1].all()                   # a U-ViT that was trained over padding


def test_cos_len_is_zero_for_equal_features_and_grows_with_the_angle():
    seen, turn = torch.ones(1, 1, dtype=torch.bool), torch.tensor([0.0, 0.5, 1.0, 2.0, 3.1])
    losses = [cos_len(torch.stack([a.cos(), a.sin()])[None, None], torch.tensor([[[1.0, 0.0]]]), seen, 1.0).item() for a in turn]
    assert losses == pytest.approx((1 - turn.cos()).tolist(), abs=1e-6) and losses == sorted(losses)


def test_cos_len_adds_the_squared_difference_of_lengths():
    pred, target = torch.tensor([[[3.0, 4.0], [6.0, 8.0]]]), torch.tensor([[[6.0, 8.0], [0.6, 0.8]]])    # lengths 5, 10 and 10, 1; angle 0
    assert cos_len(pred, target, torch.ones(1, 2, dtype=torch.bool), 0.02).item() == pytest.approx(0.02 * (5**2 + 9**2) / 2, rel=1e-5)
    assert cos_len(pred, target, torch.ones(1, 2, dtype=torch.bool), 0).item() == pytest.approx(0, abs=1e-6)


def test_cos_len_counts_only_seen_tokens():
    g = torch.Generator().manual_seed(0)
    pred, target, seen = torch.randn(2, 5, 8, generator=g), torch.randn(2, 5, 8, generator=g), torch.arange(5) < torch.tensor([[2], [4]])
    loss = cos_len(pred, target, seen, 0.1)
    assert torch.equal(loss, cos_len(torch.where(seen[..., None], pred, torch.full_like(pred, 9.0)), target, seen, 0.1))
    assert not torch.isclose(loss, cos_len(pred, target, torch.ones_like(seen), 0.1))
    assert not torch.isclose(loss, cos_len(torch.where(seen[..., None], 2 * pred, pred), target, seen, 0.1))


def test_the_alignment_loss_looks_at_what_the_unet_sees():
    g = torch.Generator().manual_seed(0)
    h, h_mask, target = torch.randn(3, 7, 32, generator=g), torch.ones(3, 7, dtype=torch.bool), torch.randn(3, 6, 16, generator=g)
    mask, s, adapter = torch.arange(6) < torch.tensor([[2], [6], [3]]), Settings(width=32, heads=2), adapter_of()
    hidden = torch.where(mask[..., None], target, -target)

    def loss(target, s=s, sees=False, mask=mask):
        return llm_adapter.alignment_loss(s, adapter, h, h_mask, target, mask, sees).item()
    assert loss(target) == loss(hidden) and loss(target, sees=True) != pytest.approx(loss(hidden, sees=True), abs=1e-3)
    y, present, pooled = adapter(h, h_mask)
    parts = cos_len(y, target, mask, s.length_weight), torch.nn.functional.binary_cross_entropy_with_logits(present, mask.float())
    assert loss(target) == pytest.approx(sum(parts).item(), rel=1e-4)
    weighted = dataclasses.replace(s, pooled_weight=2.0)
    last = torch.stack([target[0, 1], target[1, 5], target[2, 2]])
    more = cos_len(pooled, last, torch.ones(3, dtype=torch.bool), s.length_weight)
    assert loss(target, weighted) == pytest.approx((sum(parts) + 2 * more).item(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------------- the data
CAPTIONS, PAIRS = [f"caption {i}" for i in range(50)], [(f"Satz {i}", f"sentence {i}") for i in range(50)]


def test_batches_of_texts_depend_on_the_step_alone():
    s = Settings(steps=(12, 0, 0), batch=(16, 1, 1))
    whole = list(pair_batches(s, CAPTIONS, PAIRS, 0))
    assert len(whole) == 12 and whole == list(pair_batches(s, CAPTIONS, PAIRS, 0)) and whole[7:] == list(pair_batches(s, CAPTIONS, PAIRS, 7))
    assert all(len(batch) == 16 and batch[0] == ("", "") and ("", "") not in batch[1:] for batch in whole)
    assert len({tuple(batch) for batch in whole}) == 12
    assert whole != list(pair_batches(dataclasses.replace(s, seed=1), CAPTIONS, PAIRS, 0))


@pytest.mark.parametrize("english", [0.0, 0.3, 1.0])
def test_so_many_texts_as_asked_are_captions_which_stand_for_themselves(english):
    texts = [pair for batch in pair_batches(Settings(english=english, steps=(40, 0, 0)), CAPTIONS, PAIRS, 0) for pair in batch[1:]]
    themselves = [text for text, target in texts if text == target]
    assert len(themselves) == pytest.approx(english * len(texts), abs=0.03 * len(texts))
    assert set(themselves) == (set(CAPTIONS) if english else set())
    assert {pair for pair in texts if pair[0] != pair[1]} == (set() if english == 1 else set(PAIRS))


def test_without_pairs_all_texts_are_captions():
    texts = [pair for batch in pair_batches(Settings(steps=(20, 0, 0)), CAPTIONS, [], 0) for pair in batch[1:]]
    assert {text for text, _ in texts} == set(CAPTIONS) and all(text == target for text, target in texts)


def test_pairs_are_read_as_they_were_written(tmp_path):
    pairs = [("drei grüne Kreise", "three green circles"), ("三个绿色的圆形 🟢", "three\ngreen circles"), ("a\u2028b\x85c", "lines of other kinds")]
    for escaped in (True, False):
        lines = [json.dumps({"language": "x", "text": text, "english": english}, ensure_ascii=escaped) for text, english in pairs]
        for end in ("\n", "\r\n"):
            (tmp_path / "pairs.jsonl").write_bytes("".join(line + end for line in lines).encode())
            assert read_pairs(tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize("line", [b"{", b'{"text": "a"}', b'{"english": "a"}', b'["text", "english"]', b'"text english"', b"7", b"null", b"a\tb",
                                  b'{"text": null, "english": "a"}', b'{"text": "a", "english": ["b"]}'])
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"text": "ein Mann", "english": "a man"}\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert str(path) in str(error.value) and "line 2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, '{"text": "grün", "english": "green"}\n'.encode("latin-1"), '{"text": "a"}'.encode("utf-16")])
def test_a_file_of_pairs_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--parallel .*pairs.jsonl"):
        read_pairs(path)


def scored(scores, field="beauty"):
    """A data set of pictures with a score each in the annotations."""
    return SimpleNamespace(items=[(Path(f"pictures/{name}"), ["a caption"], {"file_name": name} if score is None else {field: score})
                                  for name, score in scores.items()])


def names(dataset):
    return {path.name for path, _, _ in dataset.items}


SCORES = {f"{i:02d}.png": (7 * i) % 10 + 0.5 for i in range(10)}                    # 10 pictures, from 0.5 to 9.5 in another order


@pytest.mark.parametrize("best, kept", [(0.3, 3), (1.0, 10), (0.01, 1)])
def test_the_best_pictures_are_kept(tmp_path, best, kept):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES | {"elsewhere.png": 100}))
    expected = set(sorted(SCORES, key=SCORES.get)[-kept:])
    assert names(best_pictures(Settings(best=best, quality="beauty"), scored(SCORES))) == expected
    assert names(best_pictures(Settings(best=best, quality=str(tmp_path / "scores.json")), scored(SCORES, "other"))) == expected


def test_pictures_without_a_score_are_refused(tmp_path):
    for missing in (None, "good"):
        with pytest.raises(UserError, match="--quality beauty: 1 of 10 .*04.png"):
            best_pictures(Settings(quality="beauty"), scored(SCORES | {"04.png": missing}))
    path = tmp_path / "scores.json"
    for content, first in (({name: 1 for name in SCORES if name != "03.png"}, "03.png"), ([1, 2], "00.png")):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"--quality .*scores.json.*{first}"):
            best_pictures(Settings(quality=str(path)), scored(SCORES))
    for content in ("{", None):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(UserError, match="scores.json"):
            best_pictures(Settings(quality=str(path)), scored(SCORES))


def test_the_best_pictures_keep_their_own_latents(coco, tmp_path):
    torch.manual_seed(0)
    dataset = Latents(coco, "train", 16, Autoencoder(32, (1, 1), blocks=1).eval(), "a.pth", folder=tmp_path / "latents")
    before = {path.name: dataset.picture(i) for i, (path, _, _) in enumerate(dataset.items)}
    (tmp_path / "scores.json").write_text(json.dumps({name: i for i, name in enumerate(before)}))
    dataset = best_pictures(Settings(quality=str(tmp_path / "scores.json"), best=0.25), dataset)
    assert len(dataset) == 3
    for i, (path, texts, _) in enumerate(dataset.items):
        moments, caption, _ = dataset[i, 0]
        assert torch.equal(moments, before[path.name]) and caption in texts


# ----------------------------------------------------------------------------------------------------------- the toy parts
def random_scenes(count, seed=0):
    rng = random.Random(seed)
    return [shapes.random_scene(rng) for _ in range(count)]


def test_plain_english_is_the_same_from_either_end():
    assert tellings.plain(Scene((Group(3, "green", "circle"), Group(1, "blue", "square")), "above")) == "three green circles above a blue square"
    assert tellings.plain(Scene((Group(1, "blue", "square"), Group(3, "green", "circle")), "below")) == "three green circles above a blue square"
    assert tellings.plain(Scene((Group(2, "red", "triangle"),))) == "two red triangles"
    told = {}
    for scene in random_scenes(2000):
        ends = {scene} if not scene.relation else {scene, Scene(scene.groups[::-1], OPPOSITE[scene.relation])}
        assert len({tellings.plain(end) for end in ends}) == 1
        assert told.setdefault(tellings.plain(scene), ends) == ends                 # and of no other scene


def test_pairs_of_the_toy_world_tell_every_scene_in_every_language(tmp_path):
    files = []
    for name in ("a", "b"):
        shapes.write_split(tmp_path / name, "train", random_scenes(30), 24, random.Random(0))
        files.append(tellings.build_parallel(tmp_path / name))
    assert files[0] == tmp_path / "a" / "annotations" / "parallel_train2017.jsonl" and files[0].read_bytes() == files[1].read_bytes()
    lines = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    kinds = [("spanish", "german", "chinese", "long") for _ in range(30)]
    assert [line["language"] for line in lines] == [kind for some in kinds for kind in some]
    assert [line["english"] for line in lines] == [tellings.plain(scene) for scene, some in zip(random_scenes(30), kinds) for _ in some]
    lengths = sorted(len(line["text"].split()) for line in lines if line["language"] == "long")
    assert lengths[0] >= 10 and lengths[len(lengths) // 2] > 40 and 80 < lengths[-1] <= 120                    # of all lengths
    assert read_pairs(files[0]) == [(line["text"], line["english"]) for line in lines]
    files[0].write_text("mine")
    assert tellings.build_parallel(tmp_path / "a").read_text() == "mine"            # built once
    assert {path.name for path in files[0].parent.iterdir()} == {"captions_train2017.json", "instances_train2017.json", files[0].name}


def test_a_picture_differs_the_more_the_worse_it_is_and_better_ones_are_more_vivid():
    rng, qualities, changes, vivid = random.Random(0), [], [], []
    for scene in random_scenes(300):
        things = shapes.layout(scene, rng)
        picture = shapes.render(things, 24, rng)
        before = picture.copy()
        spoilt, quality = shapes.spoil(picture, things, rng)
        assert spoilt.shape == (24, 24, 3) and spoilt.dtype == np.uint8 and 0 <= quality <= 1 and np.array_equal(picture, before)
        if quality > 0.8:                                                           # darker than it was: further from the light background
            vivid.append(spoilt.mean() - picture.mean())
        else:
            qualities.append(quality)
            changes.append(np.abs(spoilt.astype(float) - picture).mean())
    assert min(qualities) < 0.2 and len(vivid) > 10 and max(vivid) < 0.5 and np.mean(vivid) < -1
    ranks = np.argsort(np.argsort([qualities, changes], axis=1), axis=1)
    assert np.corrcoef(ranks)[0, 1] < -0.6                                          # the worse, the more it differs


def test_the_quality_split_is_captioned_scored_and_the_same_each_time(tmp_path):
    notes = []
    for name in ("a", "b"):
        assert shapes.build_quality(tmp_path / name, 24, count=20) == tmp_path / name
        notes.append((tmp_path / name / "annotations" / "captions_quality2017.json").read_bytes())
    assert notes[0] == notes[1]
    dataset = common.CaptionedImages(tmp_path / "a", "quality", 24)
    kept = best_pictures(Settings(best=0.25), dataset)
    assert len(kept) == 5 and min(image["quality"] for _, _, image in kept.items) >= np.quantile(
        [image["quality"] for image in json.loads(notes[0])["images"]], 0.7)
    (tmp_path / "a" / "annotations" / "instances_quality2017.json").unlink()        # as an interrupted build leaves it
    shapes.build_quality(tmp_path / "a", 24, count=20)
    assert (tmp_path / "a" / "annotations" / "captions_quality2017.json").read_bytes() == notes[0]


# ------------------------------------------------------------------------------------------------------------ end to end
MACHINE = ["--device", "cpu", "--precision", "fp32"]
FLAGS = ["--base", "base", "--data", "coco", "--parallel", "pairs.jsonl", "--quality", "scores.json", "--quality-split", "train", "--width", 16,
         "--heads", 2, "--encoder-blocks", 1, "--decoder-blocks", 1, "--warmup", 0, "--decay", 0, *MACHINE]


@pytest.fixture(scope="session")
def world(tmp_path_factory, clip_folder, llama):
    """A folder with all that a training needs: captioned pictures, scores, pairs, and a U-ViT of a few steps; and a finished run, run/."""
    folder = tmp_path_factory.mktemp("world")
    make_coco(folder / "coco")
    status, _, errors = run("uvit_fusion.py", "--train", "--data", "coco", "--clip", clip_folder, "--steps", 3, "--out", "base", *TINY,
                            "--init", "published", cwd=folder)
    assert status == 0, errors
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"text": f"Bild {i}, erzählt", "english": f"picture {i} told"}) + "\n" for i in range(9)))
    (folder / "scores.json").write_text(json.dumps({f"{i:012d}.jpg": i for i in range(12)}))
    shutil.copytree(llama, folder / "llm")
    ok(adapt(folder))
    return folder


def adapt(folder, *more, out="run", steps=(3, 2, 2)):
    return run("llm_adapter.py", "--train", "--llm", "llm", "--out", out, "--steps", *steps, "--batch", 4, 4, 4, *FLAGS, *more, cwd=folder)


def ok(result):
    assert result[0] == 0, result[2]
    return result[1]


def interrupted(monkeypatch, at):
    """From now on the training gets a Ctrl-C in its step number `at`."""
    lerp, calls = torch._foreach_lerp_, []

    def interrupting(*args):
        lerp(*args)
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(torch, "_foreach_lerp_", interrupting)


def same_weights(a, b, part=""):
    a, b = (load_file(path) if isinstance(path, Path) else path for path in (a, b))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a if name.startswith(part))


def test_three_stages_leave_a_run_that_draws(world):
    for name in ("config.json", "uvit.json", "model.safetensors", "stage1.safetensors", "stage2.safetensors", "stage3.safetensors", "state.pt",
                 "metrics1.csv", "metrics2.csv", "metrics3.csv", "samples/validation.png"):
        assert (world / "run" / name).stat().st_size > 0, name
    assert not list(world.rglob("*.unfinished*"))
    assert same_weights(world / "run" / "model.safetensors", world / "run" / "stage3.safetensors")
    for weights in ("run", "run/stage1.safetensors"):
        ok(run("sample.py", "ein Mann", "二匹の馬 🐎", "--run", weights, "--sample-steps", 2, "--singles", *MACHINE, cwd=world))
        assert (world / "run" / "samples" / "prompts_0001.png").exists()


def test_each_stage_changes_only_what_it_trains(world):
    stages = [load_file(world / "run" / f"stage{n}.safetensors") for n in (1, 2, 3)]
    base = {f"uvit.{name}": tensor for name, tensor in load_file(world / "base" / "model.safetensors").items()}
    assert same_weights(base, {name: stages[0][name] for name in base})
    assert not same_weights(stages[0], stages[1], "adapter.") and not same_weights(stages[0], stages[1], "uvit.")
    assert same_weights(stages[1], stages[2], "adapter.") and not same_weights(stages[1], stages[2], "uvit.")


@pytest.fixture
def bench(world, tmp_path):
    """What `train` is given, around networks that nobody else has."""
    flagship, llm = sample.load_run(world / "base", "cpu", "fp32"), LLMEncoder(world / "llm")
    s = Settings(llm=str(world / "llm"), width=16, heads=2, encoder_blocks=1, decoder_blocks=1, steps=(2, 2, 2), batch=(4, 4, 4), warmup=0, drop=0.5)
    torch.manual_seed(0)
    average, painter = llm_adapter.make(s, flagship.settings, llm, tmp_path, torch.device("cpu"), torch.float32)
    average["uvit"].load_state_dict(flagship.model.state_dict())
    data = {1: (CAPTIONS, PAIRS), 2: flagship.data(world / "coco", "train")}
    return SimpleNamespace(s=s, flagship=flagship, llm=llm, clip=flagship.encoder, average=average, painter=painter, model=copy.deepcopy(average),
                           data=data | {3: data[2]})


def moved(module):
    """True if any parameter has a gradient that is not zero."""
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


TRAINED = {1: {"adapter"}, 2: {"adapter", "uvit"}, 3: {"uvit"}}


@pytest.mark.parametrize("n", TRAINED)
def test_the_losses_of_a_stage_reach_only_what_it_trains(bench, n):
    randomized(bench.model)
    parts = {"adapter": bench.model["adapter"], "uvit": bench.model["uvit"], "llm": bench.llm.model, "clip": bench.clip.model}
    for part in parts.values():
        part.requires_grad_(True)                                                   # nothing is frozen by a flag, only by how it is used
    if n == 1:
        batch = next(pair_batches(bench.s, CAPTIONS, PAIRS, 0))
        losses = llm_adapter.text_losses(bench.s, bench.model, bench.llm, bench.clip, bench.painter, batch)
    else:
        pictures, captions, _ = next(iter(common.batches(bench.data[2], 4, 0, 1, 0)))
        losses = llm_adapter.picture_losses(bench.s, n, 1, bench.model, bench.llm, bench.painter, pictures, captions)
    for loss in losses:
        loss.backward()
    assert {name for name, part in parts.items() if moved(part)} == TRAINED[n]


@pytest.mark.parametrize("n", TRAINED)
def test_a_stage_trains_what_it_should_and_nothing_else(bench, n):
    before = {name: copy.deepcopy(part.state_dict()) for name, part in (*bench.model.items(), ("llm", bench.llm.model), ("clip", bench.clip.model))}
    llm_adapter.train(n, bench.s, bench.model, bench.average, bench.llm, bench.clip, bench.painter, bench.data[n])
    after = {name: part.state_dict() for name, part in (*bench.model.items(), ("llm", bench.llm.model), ("clip", bench.clip.model))}
    assert {name for name in before if not same_weights(before[name], after[name])} == TRAINED[n]
    assert {name for name, part in bench.model.items() if moved(part)} == TRAINED[n] and not moved(bench.llm.model)
    buffers = dict(bench.model["adapter"].named_buffers())
    assert len(buffers) == 2 and all(torch.equal(before["adapter"][name], buffer) for name, buffer in buffers.items())


def test_stage_1_learns_to_stand_in_for_clip(bench):
    s = dataclasses.replace(bench.s, steps=(60, 0, 0), batch=(6, 1, 1), lr=(5e-3, 1e-3, 1e-3))
    pairs = [("ein Mann", "a man on a horse"), ("zwei rote Kreise", "two red circles")]
    llm_adapter.train(1, s, bench.model, bench.average, bench.llm, bench.clip, bench.painter, (["a man on a horse"], pairs))
    losses = [float(row.split(",")[1]) for row in (bench.painter.folder / "metrics1.csv").read_text().splitlines()[1:]]
    assert len(losses) == 3 and losses[-1] < 0.6 * losses[0]
    (y, mask), (target, real) = bench.painter.encoder(["ein Mann", "zwei rote Kreise", ""]), bench.clip(["a man on a horse", "two red circles", ""])
    assert torch.nn.functional.cosine_similarity(y[real], target[real], dim=-1).mean() > 0.8
    assert (mask == real).float().mean() > 0.8 and mask.sum(1).argmin() == 2          # and where the padding begins


def test_texts_of_a_batch_are_read_once_and_long_ones_apart(bench, monkeypatch):
    calls = reading(monkeypatch)
    short, long = ["", "one", "two", "six", "four", "five", "three", "seven", "eight"], ["two red circles " * 9, "a man on a horse " * 9]
    batch = [(text, text and "a man") for text in (*long, *short)]
    parts = list(llm_adapter.text_losses(bench.s, bench.model, bench.llm, bench.clip, bench.painter, batch))
    assert calls == [short[:8], [short[8], *long]] and len(parts) == 2                        # parts of eight, the last as it comes
    alone = list(llm_adapter.text_losses(bench.s, bench.model, bench.llm, bench.clip, bench.painter, [(text, "a man") for text in calls[1]]))
    assert len(alone) == 1 and parts[1].item() == pytest.approx(alone[0].item() * 3 / 11, rel=1e-5)      # every text has the same weight


def test_noise_depends_on_the_step_and_a_dropped_caption_is_the_empty_one(bench, monkeypatch):
    calls = reading(monkeypatch)
    pictures, captions, _ = next(iter(common.batches(bench.data[2], 4, 0, 1, 0)))
    randomized(bench.model)

    def loss(n, step, drop):
        s = dataclasses.replace(bench.s, drop=drop)
        return sum(llm_adapter.picture_losses(s, n, step, bench.model, bench.llm, bench.painter, pictures, captions)).item()
    values = [loss(2, 1, 0.0), loss(2, 1, 0.0), loss(2, 2, 0.0), loss(3, 1, 0.0), loss(2, 1, 1.0)]
    assert values[0] == values[1] and len(set(values)) == 4
    assert calls == [captions] * 4 + [[""] * 4]


def test_features_begin_on_the_scale_of_those_they_replace(bench, world, tmp_path):
    class Elsewhere(common.TextEncoder):
        """CLIP's features, moved and shrunk, so that an adapter that did not know would be far off."""
        def __init__(self):
            vars(self).update(vars(bench.clip))

        def __call__(self, captions):
            features, mask = bench.clip(captions)[0], torch.arange(self.length).expand(len(captions), -1) < 5
            return torch.where(mask[..., None], 30 + 0.01 * features, torch.full_like(features, 1e4)), mask
    bench.flagship.encoder, captions = Elsewhere(), ["a man on a horse", "picture 3 told in way 2"]
    painter = llm_adapter.run(bench.s, bench.flagship, world / "coco", tmp_path / "new", common.Options(), [])
    adapter, (y, _) = painter.encoder.adapter, painter.encoder(captions)
    features, mask = bench.flagship.encoder([f"picture {i} told in way {k}" for i in range(12) for k in range(5)])
    assert torch.allclose(adapter.mean, features[mask].mean(0), atol=2e-3) and torch.allclose(adapter.std, features[mask].std(0), rtol=0.2)
    assert (y - 30).abs().max() < 0.1 and 0.2 < (y - adapter.mean).std() / adapter.std.mean() < 2
    bench.flagship.settings = dataclasses.replace(bench.flagship.settings, mask_text=False)           # now the U-ViT sees the padding too
    painter = llm_adapter.run(bench.s, bench.flagship, world / "coco", tmp_path / "all", common.Options(), [])
    assert painter.encoder.adapter.mean.min() > 100 and painter.encoder(captions)[1].all()


def test_stage_by_stage_ends_as_in_one_go(world):
    assert not (world / "steps").exists()
    ok(adapt(world, "--stages", 1, out="steps"))
    assert not (world / "steps" / "stage2.safetensors").exists()
    ok(adapt(world, "--stages", 1, 2, 3, "--resume", out="steps"))
    for name in ("stage1", "stage2", "stage3", "model"):
        assert same_weights(world / "run" / f"{name}.safetensors", world / "steps" / f"{name}.safetensors"), name


def test_a_training_reads_each_text_once_with_features_that_are_kept(world, monkeypatch):
    calls = reading(monkeypatch)
    ok(adapt(world, "--features", "features", out="cached"))
    texts = [text for call in calls for text in call]
    assert len(texts) == len(set(texts)) == 1 + 12 * 5 + 9                            # the empty one, captions, pairs
    first, calls[:] = load_file(world / "cached" / "stage3.safetensors"), []
    ok(adapt(world, "--features", "features", "--overwrite", out="cached"))
    assert not calls and same_weights(first, world / "cached" / "stage3.safetensors")
    refused(adapt(world, "--features", "features", "--llm-layer", 1, out="other"), "--features")


@pytest.mark.parametrize("at, stage, step", [(2, 1, 2), (4, 2, 1), (6, 3, 1)])
def test_resumed_equals_uninterrupted_bit_for_bit(world, monkeypatch, at, stage, step):
    out = f"parts{at}"
    with monkeypatch.context() as patch:
        interrupted(patch, at)
        status, said, errors = adapt(world, out=out)
    assert status == 130 and "--resume" in said, errors
    state = torch.load(world / out / "state.pt", weights_only=True)
    assert (state["stage"], state["step"]) == (stage, step)
    ok(adapt(world, "--resume", out=out))
    for name in ("stage1", "stage2", "stage3", "model"):
        assert same_weights(world / "run" / f"{name}.safetensors", world / out / f"{name}.safetensors"), name


def test_a_ctrl_c_in_the_last_step_of_a_stage_stops_the_run_too(world, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 3)                                                       # the first stage has three
        status, said, errors = adapt(world, out="last")
    assert status == 130 and "--resume" in said, errors
    assert not (world / "last" / "stage2.safetensors").exists()
    ok(adapt(world, "--resume", out="last"))
    assert same_weights(world / "run" / "model.safetensors", world / "last" / "model.safetensors")


def test_a_stage_alone_starts_from_anothers_file(world):
    ok(adapt(world, "--stages", 2, out="alone"))
    ok(adapt(world, "--stages", 2, "--init", "run/stage1.safetensors", out="after"))
    assert {path.name for path in (world / "alone").glob("*.safetensors")} == {"stage2.safetensors", "model.safetensors"}
    assert same_weights(world / "after" / "stage2.safetensors", world / "run" / "stage2.safetensors")       # as if stage 1 were its own
    assert not same_weights(world / "alone" / "stage2.safetensors", world / "run" / "stage2.safetensors")
    refused(adapt(world, "--init", "base/model.safetensors", out="other"), "base/model.safetensors", "configuration")
    refused(adapt(world, "--init", "nowhere.safetensors", out="other"), "--init nowhere.safetensors")
    assert not (world / "other").exists()


def test_a_stage_alone_can_be_resumed(world, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        assert adapt(world, "--stages", 2, "--init", "run/stage1.safetensors", out="broken")[0] == 130
    ok(adapt(world, "--stages", 2, "--resume", out="broken"))
    assert same_weights(world / "broken" / "stage2.safetensors", world / "run" / "stage2.safetensors")


def test_a_run_is_not_overwritten_by_mistake(world):
    before = (world / "run" / "model.safetensors").read_bytes()
    refused(adapt(world), "run/", "--resume", "--overwrite")
    refused(adapt(world, "--resume", "--drop", 0.2), "drop = 0.1", "now it is 0.2")
    refused(adapt(world, "--resume", out="nothing"), "--resume", "state.pt")
    assert (world / "run" / "model.safetensors").read_bytes() == before and not (world / "nothing").exists()


def test_overwriting_leaves_nothing_of_the_run_before(world):
    shutil.copytree(world / "run", world / "again")
    ok(adapt(world, "--overwrite", "--stages", 1, out="again"))
    assert {path.name for path in (world / "again").glob("stage*")} == {"stage1.safetensors"}       # the others would be graded as its own


@pytest.fixture
def other_llm(world):
    """While a test lasts, another model lies where the LLM lay."""
    os.rename(world / "llm", world / "put away")
    save_llm(world / "llm", "LlamaForCausalLM", seed=5)
    yield
    shutil.rmtree(world / "llm")
    os.rename(world / "put away", world / "llm")


def test_a_run_refuses_another_llm(world, other_llm):
    refused(run("sample.py", "ein Mann", "--run", "run", *MACHINE, cwd=world), "run/", "another language model", "llm")
    refused(adapt(world, "--resume"), "run/ was begun from llm as it was then", "--overwrite")


def test_a_missing_llm_ends_in_one_line_and_leaves_no_run(world):
    for llm in ("nowhere", "coco"):                                                 # no such folder, and one without a model
        refused(run("llm_adapter.py", "--train", "--llm", llm, "--out", "new", *FLAGS, cwd=world), f"--llm {llm}")
    assert not (world / "new").exists()


@pytest.mark.parametrize("flags, words", [
    (["--base", "nowhere"], ["nowhere"]), (["--parallel", "nowhere.jsonl"], ["--parallel nowhere.jsonl"]),
    (["--quality", "beauty"], ["--quality beauty"]), (["--quality-split", "test"], ["captions_test2017.json"]),
    (["--preset", "huge"], ["--preset huge"]), (["--adapter", "late"], ["--adapter late"]), (["--width", 15], ["--width 15"]),
    (["--llm-layer", 9], ["--llm-layer 9"]), (["--batch", 0, 4, 4], ["--batch"]), (["--lr", -1, 0, 0], ["--lr"]),
    (["--muon-lr", -1, 0, 0], ["--muon-lr"]), (["--betas", 1, 2], ["--betas"]), (["--stages", 4], ["--stages"])])
def test_bad_flags_are_refused_in_one_line_before_anything_is_trained(world, flags, words):
    out = "refused" + flags[0]
    refused(adapt(world, *flags, out=out), *words)
    assert not (world / out).exists()


def test_only_the_toy_world_is_compared_and_others_are_told_so(world):
    refused(run("llm_adapter.py", "--compare", "--llm", "llm", "--out", "compared", *FLAGS, cwd=world), "--data coco", "scenes")
    assert not (world / "compared").exists()


def test_a_folder_of_a_run_that_was_tampered_with_is_refused(world, tmp_path):
    shutil.copytree(world / "llm", tmp_path / "llm")
    copied = shutil.copytree(world / "run", tmp_path / "run")

    def drawn():
        return run("sample.py", "ein Mann", "--run", "run", "--sample-steps", 1, *MACHINE, cwd=tmp_path)
    ok(drawn())
    (copied / "model.safetensors").write_bytes((world / "base" / "model.safetensors").read_bytes())
    refused(drawn(), "model.safetensors", "configuration")
    (copied / "model.safetensors").write_bytes((world / "run" / "model.safetensors").read_bytes()[:1000])
    refused(drawn(), "model.safetensors", "damaged")
    (copied / "uvit.json").unlink()
    refused(drawn(), "uvit.json")
    (copied / "config.json").write_text('{"method": "llm_adapter", "size": 16}')
    refused(drawn(), "config.json", "size")


def test_without_an_action_help_is_printed(tmp_path):
    status, out, errors = run("llm_adapter.py", cwd=tmp_path)
    assert status == 0 and "--stages" in out and not errors and not list(tmp_path.iterdir())


def test_importing_has_no_side_effects(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("llm_adapter_again", ROOT / "llm_adapter.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    torch.manual_seed(3)
    random.seed(3)
    before, path = (torch.get_rng_state(), random.getstate(), torch.get_num_threads(), dict(os.environ)), list(sys.path)
    spec.loader.exec_module(module)
    after = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), dict(os.environ)
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and sys.path == path
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
