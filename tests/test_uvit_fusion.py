"""The flagship's claims: what the network is, what the diffusion does, how a training behaves. A good place to start reading."""
import dataclasses
import math

import pytest
import torch

import uvit_fusion
from common import UserError
from uvit_fusion import PRESETS, Diffusion, Settings, UViT, attention, guided, softmax_attention, unpatchify

# first weights as published: with "fan_in" a block begins as the identity, and would do nothing that a test could see
SMALL = Settings(size=8, patch=2, dim=32, depth=4, heads=2, text_dim=16, text_length=5, image_blocks=1, caption_blocks=1, init="published")
VARIANTS = [dict(fusion=f, image_blocks=v, caption_blocks=c) for f in ("concat", "cross") for v, c in ((0, 0), (1, 1), (2, 2))]


def inputs(s, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(s.text_length) < torch.tensor([[2], [s.text_length], [3]])[:batch]
    return (torch.randn(batch, s.channels, s.size, s.size, generator=g), torch.randint(1, 1001, (batch,), generator=g),
            torch.randn(batch, s.text_length, s.text_dim, generator=g), mask)


def network(s=SMALL, seed=0, **change):
    torch.manual_seed(seed)
    return UViT(dataclasses.replace(s, **change)).eval()


# ---------------------------------------------------------------------------------------------------------------- network
@pytest.mark.parametrize("depth, tensors, parameters", [(12, 166, 44_692_644), (16, 214, 58_345_636)])
def test_early_fusion_has_the_published_names_shapes_and_count(depth, tensors, parameters):
    s = Settings(**PRESETS["coco"] | dict(depth=depth, image_blocks=0, caption_blocks=0, text_dim=768, text_length=77))
    with torch.device("meta"):
        state = UViT(s).state_dict()
    expected = {"pos_embed": (1, 334, 512), "patch_embed.proj.weight": (512, 4, 2, 2), "patch_embed.proj.bias": (512,),
                "context_embed.weight": (512, 768), "context_embed.bias": (512,), "norm.weight": (512,), "norm.bias": (512,),
                "decoder_pred.weight": (16, 512), "decoder_pred.bias": (16,), "final_layer.weight": (4, 4, 3, 3), "final_layer.bias": (4,)}
    for block in [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(depth // 2)] + ["mid_block"]:
        expected |= {f"{block}.{norm}.{kind}": (512,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        expected |= {f"{block}.attn.qkv.weight": (1536, 512), f"{block}.attn.proj.weight": (512, 512), f"{block}.attn.proj.bias": (512,),
                     f"{block}.mlp.fc1.weight": (2048, 512), f"{block}.mlp.fc1.bias": (2048,),
                     f"{block}.mlp.fc2.weight": (512, 2048), f"{block}.mlp.fc2.bias": (512,)}
        if block.startswith("out"):
            expected |= {f"{block}.skip_linear.weight": (512, 1024), f"{block}.skip_linear.bias": (512,)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert len(state) == tensors and sum(tensor.numel() for tensor in state.values()) == parameters


@pytest.mark.parametrize("v, c, fusion, giga_macs", [
    (0, 0, "concat", 16.23), (3, 3, "concat", 15.12), (5, 1, "concat", 13.39), (6, 2, "concat", 13.02), (0, 0, "cross", 13.02),
    (3, 3, "cross", 13.40), (3, 1, "cross", 12.91)])
def test_cost_at_the_papers_size_is_that_of_the_released_code(v, c, fusion, giga_macs):
    from eval import forward_flops
    s = Settings(**PRESETS["coco"] | dict(image_blocks=v, caption_blocks=c, fusion=fusion, text_dim=768, text_length=77))
    assert forward_flops(s) / 2e9 == pytest.approx(giga_macs, abs=0.02)


def test_fused_attention_equals_softmax():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8, generator=g), torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 4, 9, 8, generator=g)
    bias = torch.zeros(2, 1, 1, 9).masked_fill(torch.rand(2, 1, 1, 9, generator=g) < 0.3, -math.inf)
    for b in (None, bias):
        assert torch.allclose(softmax_attention(q, k, v, b), attention(q, k, v, b), atol=1e-6)


def test_unpatchify_inverts_the_cutting_into_patches():
    x = torch.randn(2, 3, 8, 8)
    patches = [x[:, :, i:i + 2, j:j + 2].permute(0, 2, 3, 1).flatten(1) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    assert torch.equal(unpatchify(torch.stack(patches, dim=1), 2), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_skips_are_last_in_first_out(variant):
    model, given, taken = network(**variant), [], []
    for block in model.in_blocks:
        block.register_forward_hook(lambda module, args, output: given.append(output))
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda module, args: taken.append(args[1]))
    model(*inputs(SMALL))
    assert len(given) == len(taken) == 2
    assert all(a is b for a, b in zip(given, reversed(taken)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_reaches_only_the_joint_blocks(variant):
    model, record = network(**variant), []
    x, t, text, mask = inputs(SMALL)
    model(x, t, text, mask, record)
    patches, v = 16, variant["image_blocks"]
    expected = [1 + patches + (SMALL.text_length if v <= i <= 4 - v else 0) for i in range(5)]
    assert [logits.shape[-1] for logits, _, _ in record] == expected
    seen = []
    for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x, t, text, mask)
    first, seen[:] = seen[:], []
    model(x, t, text + 1, mask)
    same = [torch.equal(a, b) for a, b in zip(first, seen)]
    assert same == [i < v for i in range(5)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_padding_does_not_change_the_output(variant):
    model, (x, t, text, mask) = network(**variant), inputs(SMALL)
    other = torch.where(mask[..., None], text, torch.full_like(text, 7.0))
    assert torch.allclose(model(x, t, text, mask), model(x, t, other, mask), atol=1e-5)
    blind = network(mask_text=False, **variant)
    assert not torch.allclose(blind(x, t, text, mask), blind(x, t, other, mask), atol=1e-6)


def test_caption_blocks_run_once_per_prompt():
    model, calls, steps = network(), [], []
    model.caption_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    model.mid_block.register_forward_hook(lambda *_: steps.append(1))
    x, t, text, mask = inputs(SMALL)
    Diffusion("cosine", "x0").sample(guided(model, text, mask, text[:1], mask[:1], 3.0), x, 10)
    assert len(calls) == 2 and len(steps) == 10                     # once for the prompts, once for the empty caption
    Diffusion("cosine", "x0").sample(guided(model, text, mask, text[:1], mask[:1], 1), x, 2)
    assert len(calls) == 3                                          # unguided, the empty caption is not read


def test_guidance_one_equals_the_conditional_model():
    model, (x, t, text, mask) = network(), inputs(SMALL)
    alone = guided(model, text, mask, text[1:2], mask[1:2], 1)(x, t)
    assert torch.equal(alone, model(x, t, text, mask))
    # and the general formula tends to it
    assert torch.allclose(guided(model, text, mask, text[1:2], mask[1:2], 1.0 + 1e-7)(x, t), alone, atol=1e-5)


def test_guidance_extrapolates_from_the_empty_caption():
    model, (x, t, text, mask) = network(), inputs(SMALL)
    uncond = model(x, t, text[1:2].expand(3, -1, -1), mask[1:2].expand(3, -1))
    cond = model(x, t, text, mask)
    assert torch.allclose(guided(model, text, mask, text[1:2], mask[1:2], 3.0)(x, t), uncond + 3 * (cond - uncond), atol=1e-5)


@pytest.mark.parametrize("change", [dict(size=9), dict(dim=30, heads=4), dict(depth=5), dict(image_blocks=3), dict(fusion="late"),
                                    dict(target="y"), dict(schedule="flat")])
def test_settings_that_do_not_fit_are_refused(change):
    with pytest.raises(UserError, match="--"):
        network(**change)


# -------------------------------------------------------------------------------------------------------------- diffusion
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample_matches_stepwise_noising(schedule):
    diffusion, g = Diffusion(schedule), torch.Generator().manual_seed(0)
    t, n = 300, 200_000
    x = x_0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    for s in range(1, t + 1):
        alpha = diffusion.abar[s] / diffusion.abar[s - 1]
        x = alpha.sqrt() * x + (1 - alpha).sqrt() * torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
    direct = diffusion.q_sample(x_0, torch.full((n,), t), torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64))
    assert x.mean().item() == pytest.approx(direct.mean().item(), abs=0.01)
    assert x.std().item() == pytest.approx(direct.std().item(), rel=0.01)


def test_posterior_obeys_bayes_rule():
    # q(x_r | x_t, x_0) is proportional to q(x_t | x_r) q(x_r | x_0): compare the log densities at many x_r, up to a constant
    diffusion, x_0, x_t = Diffusion("linear"), torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.8, dtype=torch.float64)

    def log_normal(x, mean, variance):
        return -(x - mean)**2 / (2 * variance)
    for t, r in ((2, 1), (500, 499), (900, 650)):
        x_r = torch.linspace(-3, 3, 50, dtype=torch.float64)
        at, ar = diffusion.abar[t], diffusion.abar[r]
        bayes = log_normal(x_t, (at / ar).sqrt() * x_r, 1 - at / ar) + log_normal(x_r, ar.sqrt() * x_0, 1 - ar)
        direct = log_normal(x_r, *diffusion.posterior(x_0, x_t, t, r))
        assert torch.allclose(bayes - bayes[0], direct - direct[0], rtol=1e-8)


def test_published_schedule_is_stable_diffusions():
    abar = Diffusion("linear").abar
    assert len(abar) == 1001 and abar[0] == 1
    assert (1 - abar[1]).item() == pytest.approx(0.00085, rel=1e-6)
    assert (1 - abar[1000] / abar[999]).item() == pytest.approx(0.012, rel=1e-6)


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_a_perfect_network_recovers_x_0_under_each_sampler(sampler, target):
    # the network knows the one picture there is, so the exact eps for any x_t follows from it
    diffusion, g = Diffusion("linear", target), torch.Generator().manual_seed(0)
    x_0 = torch.rand(4, 3, 8, 8, generator=g) * 2 - 1

    def perfect(x, t):
        a, s = diffusion.scales(t, x)
        eps = (x - a * x_0) / s
        return {"eps": eps, "v": a * eps - s * x_0, "x0": x_0}[target]
    noise = torch.randn(4, 3, 8, 8, generator=g)
    x_t = diffusion.q_sample(x_0, torch.full((4,), 1000), noise)
    drawn = diffusion.sample(perfect, x_t, 20, sampler, noise=lambda: torch.randn(x_0.shape, generator=g))
    assert torch.allclose(drawn, x_0, atol=2e-3)


def test_dpm_solver_is_of_higher_order_than_ddim():
    # data N(0, 0.5^2): the exact network is linear and the exact flow only rescales; fewer steps suffice for the second-order solver
    diffusion = Diffusion("cosine", "x0")

    def exact(x, t):
        a, s = diffusion.scales(t, x)
        return a * 0.25 / (a**2 * 0.25 + s**2) * x
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = diffusion.sample(exact, x, 1000, "ddim")
    errors = {sampler: (diffusion.sample(exact, x, 20, sampler) - truth).abs().mean().item() for sampler in ("ddim", "dpm")}
    assert errors["dpm"] < 0.5 * errors["ddim"]


# --------------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_is_overfitted(variant):
    model, (x, _, text, mask) = network(**variant).train(), inputs(SMALL)
    diffusion, t = Diffusion("cosine", "x0"), torch.tensor([400, 600, 800])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x = x.clamp(-1, 1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        loss = diffusion.loss(lambda x_t, t: model(x_t, t, text, mask), x, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_learning_rate_warms_up_and_decays():
    s = dataclasses.replace(SMALL, warmup=10, steps=100, decay=0.5)
    rates = [uvit_fusion.learning_rate(s, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:50] == [1.0] * 41
    assert rates[74] == pytest.approx(0.5) and rates[-1] == pytest.approx(0, abs=1e-9)
    coco = Settings(**PRESETS["coco"])
    assert uvit_fusion.learning_rate(coco, 900_000) == 1


def test_effective_rank_counts_directions():
    from eval import effective_rank
    g = torch.Generator().manual_seed(0)
    outer = torch.rand(6, 1, generator=g) @ torch.rand(1, 9, generator=g)
    assert effective_rank(outer).item() == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5, abs=1e-6)
