"""Paper 1's claims: what the network computes, what the diffusion does, how training behaves."""
import argparse
import copy
import csv
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, refused, run, save_run, tiny_cfg, tiny_pipeline
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

import common
import image_data
import uvit_fusion
from common import UserError
from toy import validation
from uvit_fusion import PRESETS, Block, Config, Diffusion, UViT

# fusion, v, c; of the five blocks, v = 2 leaves the middle one to see text and image
VARIANTS = [("concat", 0, 0), ("concat", 1, 1), ("concat", 2, 1), ("cross", 0, 0), ("cross", 1, 2)]
LENGTH = 5  # tokens of a caption


def network(fusion="concat", v=1, c=1, **changes):
    """A small U-ViT and its cfg; no weight is zero, so that every part does something."""
    cfg = Config(**dict(size=8, patch=2, dim=32, depth=4, heads=2, text_dim=16, text_length=LENGTH,
                        fusion=fusion, image_blocks=v, caption_blocks=c) | changes)
    torch.manual_seed(0)
    model = UViT(cfg).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model, cfg


def inputs():
    """x, t, text and token_mask of three images; their captions have 2, 5 and 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    text = torch.randn(3, LENGTH, 16, generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[2], [5], [3]])
    return x, torch.tensor([1, 400, 1000]), text, mask


# -------------------------------------------------------------------- the network, by its equations
def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def block_by_its_equations(w, block, x, context=None, bias=0.0):
    """A pre-norm block of two heads: its output, and the logits of its attention."""
    keys = x if context is None else torch.cat([x, context], dim=1)
    w_q, w_k, w_v = w[f"{block}attn.qkv.weight"].view(3, 2, 16, 32)          # heads x d x D
    outputs = []
    logits = []
    for head in range(2):
        q = norm(w, f"{block}norm1", x) @ w_q[head].T
        k = norm(w, f"{block}norm1", keys) @ w_k[head].T
        v = norm(w, f"{block}norm1", keys) @ w_v[head].T
        logits.append(q @ k.transpose(1, 2) / 16**0.5 + bias)
        outputs.append(logits[-1].softmax(-1) @ v)
    x = x + linear(w, f"{block}attn.proj", torch.cat(outputs, dim=-1))
    hidden = F.gelu(linear(w, f"{block}mlp.fc1", norm(w, f"{block}norm2", x)))
    return x + linear(w, f"{block}mlp.fc2", hidden), torch.stack(logits, dim=1)


def uvit_by_its_equations(w, cfg, x, t, text, mask):
    """The whole network from the paper's text: its output, and the logits of the joint blocks.

    w: tensors by their published names.
    """
    corners = [(i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    patches = torch.stack([x[:, :, i:i + 2, j:j + 2].flatten(1) for i, j in corners], dim=1)
    patches = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    angles = t[:, None] * 10_000**(-torch.arange(16) / 16)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)[:, None]
    tokens = torch.cat([time, linear(w, "context_embed", text), patches], dim=1) + w["pos_embed"]
    time, text, patches = tokens.split([1, LENGTH, 16], dim=1)

    hide = torch.zeros(3, 1, LENGTH)
    if cfg.mask_text:
        hide = hide.masked_fill(~mask[:, None], -math.inf)
    for i in range(cfg.caption_blocks):
        text, _ = block_by_its_equations(w, f"caption_blocks.{i}.", text, bias=hide)
    x = torch.cat([time, patches], dim=1)
    outputs = []
    joint_logits = []
    names = ["in_blocks.0.", "in_blocks.1.", "mid_block.", "out_blocks.0.", "out_blocks.1."]
    for i, name in enumerate(names):
        context, bias = None, 0.0
        if cfg.image_blocks <= i <= 4 - cfg.image_blocks:                       # a joint block
            if cfg.fusion == "cross":
                context, bias = text, F.pad(hide, (17, 0))
            else:
                bias = F.pad(hide, (1, 16))
                if x.shape[1] == 17:
                    x = torch.cat([x[:, :1], text, x[:, 1:]], dim=1)
        elif x.shape[1] > 17:
            x = torch.cat([x[:, :1], x[:, 1 + LENGTH:]], dim=1)
        if name.startswith("out"):                                              # last in, first out
            x = linear(w, f"{name}skip_linear", torch.cat([x, outputs[4 - i]], dim=-1))
        x, logits = block_by_its_equations(w, name, x, context, bias)
        outputs.append(x)
        if logits.shape[-1] > 17:
            joint_logits.append(logits)
    x = linear(w, "decoder_pred", norm(w, "norm", x[:, -16:]))
    image = torch.zeros(3, 3, 8, 8)
    for n, (i, j) in enumerate(corners):
        image[:, :, i:i + 2, j:j + 2] = x[:, n].view(3, 2, 2, 3).permute(0, 3, 1, 2)
    output = F.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return output, joint_logits


@pytest.mark.parametrize("mask_text", [True, False])
@pytest.mark.parametrize("fusion, v, c", VARIANTS)
def test_the_network_is_the_papers(fusion, v, c, mask_text):
    model, cfg = network(fusion, v, c, mask_text=mask_text)
    expected, expected_logits = uvit_by_its_equations(model.state_dict(), cfg, *inputs())
    assert torch.allclose(model(*inputs()), expected, atol=1e-4), "tokens, skips, or the bias"
    x, t, text, mask = inputs()
    output, logits = model.denoise(x, t, model.encode_text(text, mask), mask, return_logits=True)
    assert torch.allclose(output, expected, atol=1e-4)
    assert len(logits) == model.joint_blocks == len(expected_logits)
    for one, other in zip(logits, expected_logits):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("context_tokens", [0, 4])
def test_a_block_is_its_equations_with_the_context_normed(context_tokens):
    torch.manual_seed(0)
    block = Block(32, 2, skip=True)
    x, skip = torch.randn(2, 3, 6, 32)
    context = 3 + 2 * torch.randn(3, 4, 32) if context_tokens else None
    bias = torch.randn(3, 1, 1, 6 + context_tokens)
    for parameter in (*block.norm1.parameters(), *block.norm2.parameters()):
        parameter.data += 0.3 * torch.randn_like(parameter)      # all alike at first
    w = block.state_dict()
    joined = linear(w, "skip_linear", torch.cat([x, skip], dim=-1))
    expected, _ = block_by_its_equations(w, "", joined, context, bias[:, 0])
    logits = []
    found = block(x, skip, context, bias, logits)
    assert torch.allclose(found, expected, atol=1e-5), "skip_linear of [x, skip], in this order"
    assert len(logits) == 1, "the list of logits goes to attn"
    expected, _ = block_by_its_equations(w, "", x, context, bias[:, 0])
    assert torch.allclose(block(x, None, context, bias), expected, atol=1e-5)


@pytest.mark.parametrize("fusion, v, c", VARIANTS)
def test_text_reaches_the_joint_blocks_only(fusion, v, c):
    model, _ = network(fusion, v, c)
    x, t, text, mask = inputs()
    seen = []
    for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x, t, text, mask)
    model(x, t, text + 1, mask)
    changed = [not torch.equal(one, other) for one, other in zip(seen[:5], seen[5:])]
    assert changed == [i >= v for i in range(5)]          # the last blocks through the image
    joint = 22 if fusion == "concat" else 17              # 1 time, 16 patches, 5 text tokens
    lengths = [output.shape[1] for output in seen[:5]]
    assert lengths == [joint if v <= i <= 4 - v else 17 for i in range(5)]


@pytest.mark.parametrize("fusion", ["concat", "cross"])
def test_padding_has_no_influence_if_it_is_masked(fusion):
    x, t, text, mask = inputs()
    other = torch.where(mask[..., None], text, 7.0)
    model, _ = network(fusion)
    assert torch.allclose(model(x, t, text, mask), model(x, t, other, mask), atol=1e-5)
    published, _ = network(fusion, mask_text=False)
    assert not torch.allclose(published(x, t, text, mask), published(x, t, other, mask), atol=0.01)


def test_caption_blocks_see_no_time_and_run_once_a_prompt():
    model, _ = network()
    x, _, text, mask = inputs()
    seen = []
    for name, block in (("caption", model.caption_blocks[0]), ("image", model.mid_block)):
        block.register_forward_hook(lambda *_, name=name: seen.append(name))
    denoiser = uvit_fusion.cfg_denoiser(model, text, mask, text[:1], mask[:1], w=3.0)
    Diffusion("cosine", "x0").sample(denoiser, x, steps=10)
    assert seen == ["caption"] * 2 + ["image"] * 10       # for the prompts and the empty one


@pytest.mark.parametrize("fusion", ["concat", "cross"])
def test_the_blocks_before_the_join_run_once_for_all_captions_of_an_image(fusion):
    model, _ = network(fusion=fusion)
    x, t, text, mask = inputs()
    rows = []
    model.in_blocks[0].register_forward_hook(lambda *args: rows.append(len(args[-1])))
    y = model.encode_text(torch.cat([text, -text]), torch.cat([mask, mask]))
    both = model.denoise(x, t, y, torch.cat([mask, mask]))
    expected = torch.cat([model(x, t, text, mask), model(x, t, -text, mask)])
    assert rows == [3, 3, 3] and torch.allclose(both, expected, atol=1e-5)


def test_the_time_embedding_is_cosines_then_sines():
    embedding = uvit_fusion.timestep_embedding(torch.tensor([0, 3]), 4)
    expected = [[1, 1, 0, 0], [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]]
    assert torch.allclose(embedding, torch.tensor(expected), atol=1e-6), "the exponent is -i / half"


def test_the_fused_kernel_equals_the_softmax():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 7, 8)
    k, v = torch.randn(2, 2, 4, 9, 8)
    for bias in (None, torch.zeros(2, 1, 1, 9).masked_fill(torch.rand(2, 1, 1, 9) < 0.3, -100)):
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) / 8**0.5
        expected = (logits if bias is None else logits + bias).softmax(-1) @ v
        assert torch.allclose(uvit_fusion.softmax_attention(q, k, v, bias), expected, atol=1e-5)
        assert torch.allclose(uvit_fusion.attention(q, k, v, bias), expected, atol=1e-5)
        coarse = uvit_fusion.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
        assert torch.allclose(coarse.float(), expected, atol=0.05)


def test_first_weights_are_of_unit_gain_in_blocks_that_do_nothing():
    torch.manual_seed(0)
    model = UViT(Config(dim=256, depth=2, image_blocks=0))
    x = torch.randn(2, 7, 256)
    for block in (*model.in_blocks, model.mid_block, *model.caption_blocks):
        assert torch.equal(block(x), x)
        assert block.attn.qkv.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(1, rel=0.02)
    published = UViT(Config(dim=256, depth=2, image_blocks=0, init="published"))
    for weight in (published.mid_block.mlp.fc2.weight, published.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("depth, parameters", [(12, 44_692_644), (16, 58_345_636)])
def test_early_fusion_has_the_published_names_and_shapes(depth, parameters):
    layers = {"patch_embed.proj": (512, 4, 2, 2), "context_embed": (512, 768), "norm": (512,),
              "decoder_pred": (16, 512), "final_layer": (4, 4, 3, 3)}
    for i in range(depth + 1):
        in_or_mid = f"in_blocks.{i}" if i < depth // 2 else "mid_block"
        block = f"out_blocks.{i - depth // 2 - 1}" if i > depth // 2 else in_or_mid
        layers |= {f"{block}.norm1": (512,), f"{block}.norm2": (512,),
                   f"{block}.attn.qkv": (1536, 512), f"{block}.attn.proj": (512, 512),
                   f"{block}.mlp.fc1": (2048, 512), f"{block}.mlp.fc2": (512, 2048)}
        if i > depth // 2:
            layers[f"{block}.skip_linear"] = (512, 1024)
    expected = {"pos_embed": (1, 334, 512)} | {f"{name}.weight": layers[name] for name in layers}
    expected |= {f"{name}.bias": layers[name][:1] for name in layers if "qkv" not in name}
    early = dict(depth=depth, image_blocks=0, caption_blocks=0)
    with torch.device("meta"):
        state = UViT(Config(**PRESETS["coco"] | early)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert sum(tensor.numel() for tensor in state.values()) == parameters


@pytest.mark.parametrize("changes, words", [
    (dict(size=9), "--size 9"), (dict(dim=30, heads=4), "--heads 4"), (dict(depth=5), "--depth 5"),
    (dict(image_blocks=3), "--image-blocks 3"), (dict(autoencoder="file"), "--no-clip-x0")])
def test_settings_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Config(**dict(depth=4, image_blocks=0) | changes)


# ----------------------------------------------------------------------------------- the diffusion
def noised(diffusion):
    """x_0, t, eps of three images, the x_t that they give, and what the network should answer."""
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 3, 3, 4, 4)
    t = torch.tensor([100, 500, 900])                     # one per image
    a = diffusion.abar[t].float().view(3, 1, 1, 1)
    x_t = a**0.5 * x_0 + (1 - a)**0.5 * eps
    v = a**0.5 * eps - (1 - a)**0.5 * x_0
    return x_0, t, eps, x_t, {"x0": x_0, "eps": eps, "v": v}[diffusion.target]


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_the_exact_answer_has_loss_0_and_one_off_by_a_tenth_has_a_hundredth(target):
    diffusion = Diffusion("cosine", target)
    x_0, t, eps, x_t, answer = noised(diffusion)
    for error, expected in ((0, 0), (0.1, 0.01), (-0.2, 0.04)):
        def model(x, times, text, mask, error=error):
            assert torch.allclose(x, x_t, atol=1e-6)      # the noisy image, no other
            assert (times is t) and (text, mask) == ("text", "mask")
            return answer + error
        loss = uvit_fusion.diffusion_loss(model, diffusion, x_0, t, eps, "text", "mask")
        assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_an_answer_is_turned_into_x_0_and_eps(target):
    diffusion = Diffusion("linear", target)
    x_0, t, eps, x_t, answer = noised(diffusion)
    found, found_eps = diffusion.predict(answer, x_t, t)
    assert torch.allclose(found, x_0, atol=1e-4)
    assert torch.allclose(found_eps, eps, atol=1e-4)
    # eps is then the one that gives x_t with the clipped x_0
    clipped, clipped_eps = Diffusion("linear", target, clip_x0=True).predict(answer, x_t, t)
    assert torch.allclose(clipped, x_0.clamp(-1, 1), atol=1e-4)
    assert torch.allclose(diffusion.q_sample(clipped, t, clipped_eps), x_t, atol=1e-5)


def test_the_schedules_are_stable_diffusions_and_the_cosine():
    abar = Diffusion("linear").abar.tolist()
    assert len(abar) == 1001 and abar[0] == 1
    for t, root in ((1, 0.00085**0.5), (500, (0.00085**0.5 * 500 + 0.0120**0.5 * 499) / 999)):
        assert 1 - abar[t] / abar[t - 1] == pytest.approx(root**2)
    abar = Diffusion("cosine").abar.tolist()
    assert len(abar) == 1001 and abar[0] == 1
    f_0, f_250 = (math.cos((u + 0.008) / 1.008 * math.pi / 2)**2 for u in (0, 0.25))
    assert abar[250] == pytest.approx(f_250 / f_0)
    assert abar[1000] / abar[999] == pytest.approx(0.001)                      # beta <= 0.999


def test_posterior_obeys_bayes_rule():
    # q(x_next | x_t, x_0) ~ q(x_t | x_next) q(x_next | x_0), up to a constant in x_next
    def log_normal(x, mean, variance):
        return -(x - mean)**2 / (2 * variance)

    diffusion = Diffusion("linear")
    x_0, x_t = torch.tensor([0.3, -0.8], dtype=torch.float64)
    x_next = torch.linspace(-3, 3, 50, dtype=torch.float64)
    for t, t_next in ((2, 1), (500, 499), (900, 650)):
        abar_next = diffusion.abar[t_next]
        alpha = diffusion.abar[t] / abar_next
        bayes = log_normal(x_t, alpha.sqrt() * x_next, 1 - alpha)
        bayes = bayes + log_normal(x_next, abar_next.sqrt() * x_0, 1 - abar_next)
        found = log_normal(x_next, *diffusion.posterior(x_0, x_t, t, t_next))
        # the factor of x_next^2 is -1 / (2 variance)
        assert torch.allclose(bayes.diff().diff(), found.diff().diff(), rtol=1e-6), "variance"
        assert torch.allclose(bayes - bayes[0], found - found[0], rtol=1e-8), "mean"


def test_ddpm_adds_noise_of_the_posteriors_variance():
    torch.manual_seed(0)
    diffusion = Diffusion("cosine")
    x_0, x_t, noise = torch.randn(3, 100)
    mean, variance = diffusion.posterior(x_0, x_t, 600, 500)
    found = diffusion.step_ddpm(x_0, x_t, 600, 500, noise)
    assert torch.allclose(found, (mean + variance**0.5 * noise).float(), atol=1e-6)


def test_dpm_begins_with_a_step_of_ddim_and_then_extrapolates():
    torch.manual_seed(0)
    diffusion = Diffusion("cosine")
    x_0, before, x_t = torch.randn(3, 100)
    a, a_next, a_before = diffusion.abar[[600, 500, 800]].tolist()
    eps = (x_t - a**0.5 * x_0) / (1 - a)**0.5             # from x_t and x_0
    found = diffusion.step_dpm(x_0, x_t, 600, 500, None)
    assert torch.allclose(found, a_next**0.5 * x_0 + (1 - a_next)**0.5 * eps, atol=1e-5)
    assert torch.allclose(found, diffusion.step_ddim(x_0, eps, 500), atol=1e-5)
    # then D = x_0 + (x_0 - x_0 before) / 2r replaces x_0; r = h before / h
    now, then, earlier = (math.log((a / (1 - a))**0.5) for a in (a, a_next, a_before))
    d = x_0 + (x_0 - before) / (2 * (now - earlier) / (then - now))
    expected = ((1 - a_next) / (1 - a))**0.5 * x_t - a_next**0.5 * (math.exp(now - then) - 1) * d
    found = diffusion.step_dpm(x_0, x_t, 600, 500, (before, 800))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("schedule, sampler, steps", [
    ("cosine", "ddpm", 1000), ("cosine", "ddim", 250), ("cosine", "dpm", 25),
    ("linear", "ddpm", 1000), ("linear", "ddim", 250), ("linear", "dpm", 250)])
def test_sampling_with_the_exact_network_gives_the_datas_distribution(schedule, sampler, steps):
    diffusion = Diffusion(schedule, "x0")
    generator = torch.Generator().manual_seed(0)

    def denoiser(x_t, t):                                 # of N(0, 0.5^2): E[x_0 | x_t]
        a = diffusion.abar[t].float().view(-1, 1, 1, 1)
        return a**0.5 * 0.25 / (a * 0.25 + 1 - a) * x_t

    def noise():
        return torch.randn(20_000, 1, 1, 1, generator=generator)
    drawn = diffusion.sample(denoiser, noise(), steps, sampler, noise)
    assert drawn.mean().abs() < 0.02
    assert drawn.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_sampling_goes_from_T_to_0_in_even_strides_and_shows_its_way(sampler):
    times = []

    def denoiser(x, t):
        times.append(t.tolist())
        return torch.full_like(x, len(times) * 0.5)
    x = torch.zeros(2, 1, 1, 1)
    trajectory = []
    diffusion = Diffusion("cosine", "x0", clip_x0=True)
    drawn = diffusion.sample(denoiser, x, 4, sampler, lambda: x, trajectory)
    assert times == [[1000] * 2, [750] * 2, [500] * 2, [250] * 2]
    assert [x_0[0].item() for x_0 in trajectory] == [0.5, 1, 1, 1]             # clipped
    assert torch.equal(drawn, trajectory[-1])
    with pytest.raises(UserError, match="--sample-steps"):
        diffusion.sample(denoiser, x, 1001)


def test_timesteps_are_T_times_a_power_of_uniform_numbers(monkeypatch):
    for u, power, expected in ((0.0, 1.0, 1), (0.25, 1.0, 251), (0.25, 0.5, 501), (1.0, 0.3, 1000)):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: torch.full(shape, u))
        assert Diffusion().sample_timesteps(2, power, "cpu").tolist() == [expected] * 2


# ------------------------------------------------------------------------------------- the guidance
def test_guidance_goes_from_the_empty_caption_through_the_prompt_and_beyond():
    model, _ = network()
    x, t, text, mask = inputs()
    null, null_mask = -text[:1], mask[:1]
    cond = model(x, t, text, mask)
    uncond = model(x, t, null.expand(3, -1, -1), null_mask.expand(3, -1))
    for w in (0.0, 1.0, 3.0):
        denoiser = uvit_fusion.cfg_denoiser(model, text, mask, null, null_mask, w)
        assert torch.allclose(denoiser(x, t), uncond + w * (cond - uncond), atol=1e-4)


@pytest.mark.parametrize("w, interval, guided", [
    (3.0, (0.3, 0.8), range(3, 9)), (3.0, (0.0, 1.0), range(1, 11)), (1.0, (0.0, 1.0), [])])
def test_guidance_in_an_interval_saves_half_of_the_work_outside(w, interval, guided):
    model, _ = network()
    x, t, text, mask = inputs()
    sizes = []
    model.mid_block.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    denoiser = uvit_fusion.cfg_denoiser(model, text, mask, -text[:1], mask[:1], w, interval)
    Diffusion("cosine", "x0").sample(denoiser, x, 10)     # t = 1000, 900, ..., 100
    assert sizes == [6 if n in guided else 3 for n in range(10, 0, -1)]


def test_the_asked_share_of_captions_is_dropped():
    torch.manual_seed(0)
    captions = [f"caption {i}" for i in range(5000)]
    dropped = uvit_fusion.drop_captions(captions, 0.1)
    assert dropped.count("") / 5000 == pytest.approx(0.1, abs=0.02)
    assert all(new in ("", old) for new, old in zip(dropped, captions))


# ------------------------------------------------------------------------------------- the pipeline
def test_the_noise_of_an_image_depends_on_its_number_alone(pipeline):
    prompts = [f"a man {i}" for i in range(5)]
    trajectory = []
    whole = pipeline.generate(prompts, steps=3, seed=1, trajectory=trajectory)
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.uint8
    assert len(trajectory) == 3 and np.array_equal(trajectory[-1], whole)
    parts = pipeline.generate(prompts, steps=3, seed=1, batch_size=3)
    assert np.abs(whole - parts.astype(int)).max() <= 1
    rest = pipeline.generate(prompts[2:], steps=3, seed=1, first=2)
    assert np.abs(whole[2:] - rest.astype(int)).max() <= 1
    other = pipeline.generate(prompts, steps=3, seed=2)
    assert np.abs(whole - other.astype(int)).mean() > 5


def test_what_is_not_asked_for_is_the_runs_own(clip_folder):
    def image(**asked):
        return pipeline.generate(["a man"], steps=4, **asked).astype(int)
    own = dict(guidance=4.0, guidance_interval=(0.5, 1.0), sampler="ddim")
    pipeline = tiny_pipeline(clip_folder, **own)
    assert np.array_equal(image(), image(**own))
    for other in (dict(guidance=0.0), dict(guidance_interval=(0.0, 1.0)), dict(sampler="ddpm"),
                  dict(negative_prompt="a horse")):
        assert np.abs(image() - image(**other)).max() > 2, other


def test_pixels_and_latents_are_encoded_and_decoded(pipeline):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.allclose(pipeline.encode(images), images / 127.5 - 1)
    decoded = pipeline.decode(pipeline.encode(images))
    assert np.array_equal(decoded, images.permute(0, 2, 3, 1).numpy())

    class Halves:
        """An autoencoder: a latent is the mean of 2 x 2 pixels, with deviation 2."""
        factor = 2

        def encode(self, images):
            mean = F.avg_pool2d(images, 2)
            return mean, torch.full_like(mean, 2 * math.log(2))

        def decode(self, z):
            return F.interpolate(z, scale_factor=2.0)
    cfg = Config(size=4, clip_x0=False, latent_scale=0.5)
    latent = uvit_fusion.Pipeline(None, None, cfg, CPU, torch.float32, Halves())
    assert latent.image_size == 8
    mean = F.avg_pool2d(images / 127.5 - 1, 2)
    assert torch.allclose(latent.encode(images, sample=False), 0.5 * mean, atol=1e-6)
    moments = torch.stack([mean, torch.full_like(mean, 2 * math.log(2))], dim=1)
    torch.manual_seed(0)
    x_0 = latent.encode(moments)
    torch.manual_seed(0)
    assert torch.allclose(x_0, 0.5 * (mean + 2 * torch.randn(mean.shape)), atol=1e-5)
    assert np.array_equal(latent.decode(0.5 * mean)[:, ::2, 1::2], image_data.to_uint8(mean))


def test_a_pipeline_is_named_by_its_network_and_its_text_encoder(clip_folder):
    one, same, other = (tiny_pipeline(clip_folder, seed) for seed in (0, 0, 1))
    assert one.identity() == same.identity() != other.identity()
    same.text_encoder.model.get_input_embeddings().weight.data[0, 0] += 1
    assert one.identity() != same.identity()


def test_a_run_is_loaded_with_its_own_weights_settings_and_text_encoder(tmp_path, pipeline):
    folder = save_run(pipeline, tmp_path / "run")
    for path in (folder, folder / "model.safetensors"):
        loaded = uvit_fusion.load_pipeline(path, CPU, torch.float32)
        assert loaded.cfg == pipeline.cfg and loaded.identity() == pipeline.identity()
        assert np.array_equal(loaded.generate(["a man"], 2), pipeline.generate(["a man"], 2))
    with pytest.raises(UserError, match="none/model.safetensors: train it first"):
        uvit_fusion.load_pipeline(tmp_path / "none", CPU, torch.float32)
    pipeline.cfg.text_length = 77
    with pytest.raises(UserError, match="text of 77 tokens x 32, but .* gives 16 x 32"):
        uvit_fusion.load_pipeline(save_run(pipeline, tmp_path / "other"), CPU, torch.float32)


# ------------------------------------------------------------------------------------- the training
CPU = torch.device("cpu")
FLAGS = ["--device", "cpu", "--precision", "fp32", *TINY]
PLAIN = dict(optimizer="adamw", steps=3, lr=0.01, decay=0.5, ema=0.5, ema_warmup=False,
             caption_dropout=0.4, snapshot_at=())


def train(cfg, data, folder, rank=0, world_size=1):
    args = argparse.Namespace(resume=False, overwrite=False, workers=0, compile=None,
                              validation_samples=0)
    return uvit_fusion.train(cfg, data, folder, args, CPU, torch.float32, rank, world_size)


@pytest.fixture
def recorded(monkeypatch):
    """What `diffusion_loss` is given in training, call by call: (x_0, t, eps, text, mask)."""
    calls = []
    diffusion_loss = uvit_fusion.diffusion_loss

    def recording(model, diffusion, *batch):
        if torch.is_grad_enabled():                       # not for the validation loss
            calls.append(batch)
        return diffusion_loss(model, diffusion, *batch)
    monkeypatch.setattr(uvit_fusion, "diffusion_loss", recording)
    return calls


def joined(parts):
    return [torch.cat(part) for part in zip(*parts)]


def train_by_hand(cfg, batches):
    """The training in plain steps: (averaged weights by name, losses)."""
    torch.manual_seed(cfg.seed)
    model = UViT(cfg)
    diffusion = Diffusion(cfg.schedule, cfg.target)
    averages = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), betas=cfg.betas, weight_decay=0.03)
    losses = []
    for step, (x_0, t, eps, text, mask) in enumerate(batches, 1):
        loss = F.mse_loss(model(diffusion.q_sample(x_0, t, eps), t, text, mask), x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        optimizer.param_groups[0]["lr"] = cfg.lr * uvit_fusion.learning_rate(cfg, step)
        optimizer.step()
        decay = min(cfg.ema, step / (step + 10)) if cfg.ema_warmup else cfg.ema
        for name, tensor in model.state_dict().items():
            averages[name] = decay * averages[name] + (1 - decay) * tensor
        losses.append(loss.item())
    return averages, losses


def assert_close(found, expected):
    """Weights move by about 0.01 per step; those with almost no gradient may go either way."""
    assert found.keys() == expected.keys()
    close = [torch.isclose(found[name], expected[name], atol=3e-4).flatten() for name in expected]
    assert torch.cat(close).float().mean() > 0.999


@pytest.mark.parametrize("changes", [{}, dict(grad_clip=0.0), dict(ema=0.998, ema_warmup=True),
                                     dict(accumulate=2), dict(recompute=True)])
def test_a_training_is_what_its_steps_say(tmp_path, coco, clip_folder, recorded, changes):
    cfg = tiny_cfg(clip_folder, **PLAIN | changes)
    pipeline = train(cfg, coco, tmp_path / "run")
    parts = cfg.accumulate
    batches = [joined(recorded[n * parts:(n + 1) * parts]) for n in range(3)]
    x_0, t, eps, _, mask = joined(batches)
    images, _ = next(image_data.batches(pipeline.dataset(coco, "train"), 4, 0, 1, cfg.seed))
    assert torch.allclose(x_0[:4], images / 127.5 - 1)
    assert len(t.unique()) > 6 and eps.std().item() == pytest.approx(1, abs=0.1)
    empty = (mask.sum(1) == 2).sum()                      # captions that are only start and end
    assert 0 < empty < 12
    averages, losses = train_by_hand(cfg, batches)
    assert_close(pipeline.model.state_dict(), averages)
    assert_close(load_file(tmp_path / "run" / "model.safetensors"), averages)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        logged = float(list(csv.DictReader(file))[-1]["loss"])
    assert logged == pytest.approx(np.mean(losses), rel=0.1 if parts > 1 else 1e-3)


def test_the_learning_rate_warms_up_stays_and_falls():
    cfg = Config(warmup=10, steps=100, decay=0.5)
    rates = [uvit_fusion.learning_rate(cfg, step) for step in range(1, 101)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:50] == [1.0] * 41
    assert rates[62] == pytest.approx(0.5 * (1 + math.cos(math.pi * 13 / 50)))
    assert rates[99] == pytest.approx(0, abs=1e-9)
    assert uvit_fusion.learning_rate(Config(**PRESETS["coco"]), 1_000_000) == 1


def test_the_power_of_the_noise_rises_in_the_first_share_of_the_steps():
    """t = T u^power: a power near 0 draws t near T, almost pure noise."""
    cfg = Config(time_power=0.4, noise_first=0.25, steps=100)
    powers = [uvit_fusion.time_power(cfg, step) for step in (5, 20, 25, 100)]
    assert powers == pytest.approx([0.08, 0.32, 0.4, 0.4])
    assert uvit_fusion.time_power(Config(time_power=0.4, noise_first=0.0), 1) == 0.4


def test_a_training_draws_its_timesteps_by_this_power(tmp_path, coco, clip_folder, monkeypatch):
    powers = []
    sample_timesteps = Diffusion.sample_timesteps

    def recording(self, n, power, device):
        powers.append(power)
        return sample_timesteps(self, n, power, device)

    monkeypatch.setattr(Diffusion, "sample_timesteps", recording)
    train(tiny_cfg(clip_folder, **PLAIN, time_power=0.6, noise_first=1.0), coco, tmp_path / "run")
    assert powers[::2] == pytest.approx([0.2, 0.4, 0.6])      # a validation after each step


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, cfg = network()
    adamw, muon = uvit_fusion.make_optimizers(model, cfg, torch.float32)
    uvit_fusion.set_learning_rate([adamw, muon], cfg, cfg.warmup // 2)
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.5 * cfg.lr, rel=0.01)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.5 * cfg.muon_lr, rel=0.01)
    matrices = set(map(id, muon.param_groups[0]["params"]))
    rest = set(map(id, adamw.param_groups[0]["params"]))
    for name, parameter in model.named_parameters():
        expected = "block" in name and name.endswith("weight") and "norm" not in name
        assert (id(parameter) in matrices) == expected, name
        assert (id(parameter) in rest) != expected, name
    only, = uvit_fusion.make_optimizers(model, Config(optimizer="adamw"), torch.float32)
    assert len(only.param_groups[0]["params"]) == len(matrices) + len(rest)


@pytest.mark.parametrize("muon_text", [False, True])
def test_muon_trains_the_reading_of_text_where_it_is_told_to(
        tmp_path, coco, clip_folder, muon_text):
    cfg = tiny_cfg(clip_folder, **PLAIN | dict(
        optimizer="muon", muon_text=muon_text, init="published", lr=1e-12, weight_decay=0.0))
    torch.manual_seed(cfg.seed)
    first = UViT(cfg).state_dict()
    last = train(cfg, coco, tmp_path / "run").model.state_dict()
    moved = {name for name in first if (last[name] - first[name]).abs().max() > 1e-6}
    assert "mid_block.attn.proj.weight" in moved and "decoder_pred.weight" not in moved
    assert ("context_embed.weight" in moved) == muon_text


@pytest.mark.parametrize("caption_blocks", [0, 1])
def test_a_training_can_start_from_published_weights(tmp_path, coco, clip_folder, caption_blocks):
    """The published U-ViT has no caption blocks; another run may have them."""
    still = PLAIN | dict(init=str(tmp_path / "other.pth"), lr=1e-12, weight_decay=0.0)
    other = tiny_cfg(clip_folder, image_blocks=0, caption_blocks=caption_blocks)
    other = UViT(other).state_dict()
    torch.save(other, tmp_path / "other.pth")
    state = train(tiny_cfg(clip_folder, **still), coco, tmp_path / "run").model.state_dict()
    new = {name: tensor for name, tensor in state.items() if name.startswith("caption_blocks.")}
    torch.testing.assert_close(state, new | other)
    with pytest.raises(UserError, match="other.pth"):
        train(tiny_cfg(clip_folder, **still, patch=2), coco, tmp_path / "run2")


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, coco, clip_folder, monkeypatch):
    command = ["uvit_fusion.py", "--train", "--data", coco, "--clip", clip_folder, *FLAGS,
               "--steps", 6, "--snapshot-at", 2]
    status, _, errors = run(*command, "--out", "whole", cwd=tmp_path)
    assert status == 0, errors
    for name in ("config.json", "model.safetensors", "step2.safetensors", "state.pt",
                 "metrics.csv", "loss.png", "samples/validation.png", "samples/step_1.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0, name
    refused(run(*command, "--out", "whole", cwd=tmp_path), "whole/", "--resume", "--overwrite")
    refused(run(*command, "--resume", "--overwrite", cwd=tmp_path), "not allowed with argument")

    update_ema = uvit_fusion.update_ema
    steps = []

    def update_and_interrupt(*args):                      # Ctrl-C in the third step
        update_ema(*args)
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(uvit_fusion, "update_ema", update_and_interrupt)
    status, out, _ = run(*command, "--out", "parts", cwd=tmp_path)
    assert status == 130 and "--resume" in out
    status, _, errors = run(*command, "--out", "parts", "--resume", cwd=tmp_path)
    assert status == 0 and len(steps) == 6, errors
    whole, parts = (torch.load(tmp_path / name / "state.pt") for name in ("whole", "parts"))
    for one, other in zip(whole["parts"][:2], parts["parts"][:2]):             # model and average
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_validation_loss_is_of_the_same_images_and_noise_each_time(coco, clip_folder):
    pipeline = tiny_pipeline(clip_folder)
    dataset = image_data.CaptionedImages(coco, "val", pipeline.image_size)
    losses = [pipeline.loss(dataset) for _ in range(2)]
    assert losses[0] == losses[1]
    for parameter in pipeline.model.parameters():
        parameter.zero_()                                 # then it predicts 0 for the target x_0
    images = torch.stack([dataset[i, i][0] for i in range(len(dataset))])
    expected = pipeline.encode(images).square().mean().item()
    assert pipeline.loss(dataset) == pytest.approx(expected)


def test_a_validation_comes_ten_times_and_grades_the_last_scenes_of_the_toy_world(
        tmp_path, toy_data, clip_folder, monkeypatch):
    graded = []

    def accuracy(pipeline, data, samples, first):
        graded.append((samples, first))
        return {"all": 32.0 * len(graded)}, None
    monkeypatch.setattr(validation.judge, "accuracy", accuracy)
    # read at the start, and before and after each validation
    clock = iter([0, *range(50, 1000, 30)])
    monkeypatch.setattr(validation.time, "perf_counter", lambda: next(clock))
    pipeline = tiny_pipeline(clip_folder, steps=39)
    measured = validation.Validation(pipeline, toy_data, tmp_path, samples=3)
    measured.start_clock()
    found = {step: measured.at(step) for step in range(1, 13)}
    assert [step for step, figures in found.items() if figures["validation"]] == [3, 6, 9, 12]
    assert found[2] == {"validation": None, "right": None}
    assert found[6]["right"] == 0.64
    assert graded == [(3, 61)] * 4               # of 64
    # without the time that validations took
    assert measured.curve == [(0, 0), (50, 32), (80, 64), (110, 96), (140, 128)]
    measured.report_speed()
    results = common.read_json(tmp_path / "results.json")
    assert results["seconds_to_80"] == 95
    assert results["step_ms"] == pytest.approx(1e3 * 30 / 3)              # three steps per lap
    assert (tmp_path / "samples" / "step_6.png").exists()
    measured.folder = tmp_path / "worse"
    measured.curve.pop()
    measured.curve.pop()                                  # 80 % were never right
    measured.report_speed()
    assert "seconds_to_80" not in common.read_json(tmp_path / "worse" / "results.json")


def test_without_a_compiler_a_training_goes_on_without_it(monkeypatch, capsys):
    model = torch.nn.Linear(2, 2)

    def broken(module, **options):
        raise RuntimeError("no C++ compiler")
    monkeypatch.setattr(torch, "compile", broken)
    assert uvit_fusion.compile_network(model, CPU) is model
    assert "continuing without it (no C++ compiler)" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda module, **options: lambda x: options)
    assert uvit_fusion.compile_network(model, CPU)(0) == {"dynamic": False}


@pytest.mark.parametrize("device, changes, wanted, expected", [
    ("cpu", {}, None, "as it is"), ("cpu", {}, True, "compiled"), ("cpu", {}, False, "as it is"),
    ("cuda", {}, None, "graph"), ("cuda", {}, True, "compiled"), ("cuda", {}, False, "as it is"),
    ("cuda", {"dim": 256}, None, "compiled"), ("cuda", {"dim": 256}, False, "as it is"),
    ("cuda", {"accumulate": 2}, None, "compiled"), ("cuda", {"accumulate": 2}, False, "as it is"),
    ("cuda", {"recompute": True}, None, "compiled"),
])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_gets_a_graph_or_a_wide_network_compiled(
        monkeypatch, device, changes, wanted, expected):
    cfg = tiny_cfg("", **{"batch_size": 6} | changes)
    monkeypatch.setattr(uvit_fusion, "compile_network", lambda model, device: "compiled")

    def capture(model, inputs):
        assert not torch.is_autocast_cache_enabled()
        x, t, text, mask = (torch.ones(part.shape, dtype=part.dtype, device="meta")
                            for part in inputs)
        assert len(x) == 6 and model(x, t, text, mask).shape == x.shape
        return "graph"
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model = UViT(cfg).to("meta")
    # tensors "on a GPU" where there is none
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = uvit_fusion.prepare_network(
            model, cfg, torch.device(device), torch.bfloat16, wanted)
    assert network == expected or (expected == "as it is" and network is model)


def test_a_network_that_cannot_be_a_graph_says_what_to_do(monkeypatch):
    def capture(model, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    with pytest.raises(UserError, match=r"capturing: train with --no-compile$"):
        uvit_fusion.capture_graph(None, tiny_cfg(""), CPU, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; experiments/gpu.sh runs it")
def test_a_graph_trains_as_single_kernels_do():
    cfg = tiny_cfg("", batch_size=6)
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = UViT(cfg).to(device)
    captured = copy.deepcopy(model)
    networks = [model, uvit_fusion.capture_graph(captured, cfg, device, torch.bfloat16)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, captured)]
    for step in range(4):                                 # new inputs and new weights in each
        x = torch.randn(6, cfg.channels, cfg.size, cfg.size, device=device)
        t = torch.randint(1, 1001, (6,), device=device)
        text = torch.randn(6, cfg.text_length, cfg.text_dim, device=device)
        mask = torch.arange(cfg.text_length, device=device) < 3 + step
        for network, optimizer in zip(networks, optimizers):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (network(x, t, text, mask.expand(6, -1)).float() - x).square().mean()
            loss.backward()
            optimizer.step()
    for expected, found in zip(model.parameters(), captured.parameters()):
        assert torch.allclose(expected, found, atol=1e-3)


@pytest.mark.parametrize("flags", [
    ["--init", "none.pth"], ["--clip", "./none"], ["--data", "none"], ["--fusion", "late"],
    ["--resume"], ["--autoencoder", "none.pth", "--no-clip-x0"]])
def test_bad_flags_are_refused_and_leave_nothing_behind(tmp_path, coco, clip_folder, flags):
    command = ["uvit_fusion.py", "--train", "--data", coco, "--clip", clip_folder, *FLAGS]
    refused(run(*command, "--out", "run", *flags, cwd=tmp_path), *flags[:2])
    assert not (tmp_path / "run").exists()


def test_two_processes_train_as_one(tmp_path, coco, clip_folder, recorded, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               uvit_fusion.__file__, "--train", "--data", coco, "--clip", clip_folder, *FLAGS,
               "--preset", "toy", "--optimizer", "adamw", "--steps", "3", "--lr", "0.01",
               "--snapshot-at", "2",
               "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, timeout=300,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("3 steps of 4 images on cpu x 2") == 1         # only rank 0 speaks
    assert (tmp_path / "run" / "step2.safetensors").exists()
    # each rank alone shows what it is given; both together make the batches of one process
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    cfg = tiny_cfg(clip_folder, optimizer="adamw", steps=3, lr=0.01)
    for rank in (0, 1):
        train(cfg, coco, tmp_path / f"rank{rank}", rank, 2)
    batches = [joined(shares) for shares in zip(recorded[:3], recorded[3:])]
    eps = batches[0][2]
    assert not torch.equal(eps[:2], eps[2:])              # each rank has its own noise
    averages, _ = train_by_hand(cfg, batches)
    assert_close(load_file(tmp_path / "run" / "model.safetensors"), averages)
