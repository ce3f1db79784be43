"""Claims that the exercises in course/ check besides those of other files; see EXERCISES.md."""
import math

import pytest
import torch

import common
import uvit_fusion
from toy import judge
from toy.shapes import FIELDS, RELATIONS, Group, Scene, Thing
from uvit_fusion import Diffusion


# ------------------------------------------------------------------------------------ 1 diffusion
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_data_of_deviation_1_stay_so_from_no_noise_to_noise_alone(schedule):
    diffusion = Diffusion(schedule)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 3, 64, 64, generator=generator)
    t = torch.tensor([0, 300, 700, 1000])                 # one per image
    x_t = diffusion.q_sample(x_0, t, eps)
    assert torch.allclose(x_t[0], x_0[0]), "at t = 0 there is no noise: x_t is x_0"
    deviations = x_t.std((1, 2, 3)).tolist()
    assert deviations == pytest.approx([1] * 4, abs=0.03), "sqrt(abar)^2 + sqrt(1 - abar)^2 is 1"
    likeness = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
                for a, b in zip(x_t, x_0)]
    assert likeness == pytest.approx(diffusion.abar[t].sqrt().tolist(), abs=0.03), \
        "the correlation of x_t and x_0 is sqrt(abar_t)"


def test_the_last_step_of_the_posterior_leaves_x_0_and_no_noise():
    x_0, x_t = torch.tensor([0.3, -0.8], dtype=torch.float64)
    mean, variance = Diffusion("cosine").posterior(x_0, x_t, 40, 0)
    assert mean.item() == pytest.approx(0.3) and variance.item() == pytest.approx(0)


# -------------------------------------------------------------------------------------- 2 network
def test_patches_go_back_to_where_they_were():
    """Two images of three channels, in patches of 2 x 2."""
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    patches = [images[:, :, i:i + 2, j:j + 2].permute(0, 2, 3, 1).flatten(1)
               for i in range(0, 6, 2) for j in range(0, 6, 2)]
    found = uvit_fusion.unpatchify(torch.stack(patches, dim=1), 2)
    assert found.shape == images.shape
    assert torch.equal(found, images), "a patch is (row, column, channel), patches go row by row"


def test_attention_leaves_out_what_a_bias_of_minus_infinity_hides():
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.0, 0, 0, -math.inf, -math.inf])
    found = uvit_fusion.softmax_attention(q, k, v, bias)
    alone = uvit_fusion.softmax_attention(q, k[:, :, :3], v[:, :, :3])
    assert torch.allclose(found, alone, atol=1e-6), "the last two keys are hidden"
    even = uvit_fusion.softmax_attention(0 * q, k, v)
    assert torch.allclose(even, v.mean(2, keepdim=True).expand_as(v), atol=1e-6), \
        "equal logits give the mean of the values"


def test_a_padding_bias_hides_padding_and_no_key_around_the_text():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    bias = uvit_fusion.padding_bias(mask, before=1, after=2)
    hidden = [[0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0]]            # time, three tokens, two patches
    assert bias.shape == (2, 1, 1, 6)
    assert bias[:, 0, 0].tolist() == [[-math.inf if hide else 0 for hide in row] for row in hidden]


# ------------------------------------------------------------------------------------ 3 alignment
@pytest.mark.parametrize("relation, x, y", [
    ("above", 0, 0.15), ("below", 0, -0.15), ("left of", 0.15, 0), ("right of", -0.15, 0)])
def test_a_relation_is_that_of_the_centres_even_if_objects_overlap(relation, x, y):
    first = Thing("red", "circle", 0.5, 0.5, 0.1)
    second = Thing("blue", "square", 0.5 + x, 0.5 + y, 0.1)
    found = [name for name in RELATIONS if judge.stands(name, [first], [second])]
    assert found == [relation]


def readings(text, first, second):
    """The fields that are right, for either order of the groups and either order of the objects."""
    things = []
    for part in text.split(", "):
        colour, shape, x, y = part.split()
        things.append(Thing(colour, shape, float(x), float(y), 0.12))
    found = []
    for scene in (Scene((first, second), "above"), Scene((second, first), "below")):
        for order in (things, things[::-1]):
            verdict = judge.judge(order, scene)
            found.append({field for field in FIELDS if verdict[field]})
    return found


def test_of_two_readings_with_as_many_right_fields_the_one_of_right_colours_counts():
    found = readings("red circle 0.3 0.2, blue circle 0.7 0.2, blue square 0.5 0.7",
                     Group(1, "red", "circle"), Group(2, "blue", "square"))
    assert found == [{"count", "colour"}] * 4, "the other reading has shape and relation right"
    found = readings("red circle 0.2 0.5, red square 0.5 0.5, red square 0.8 0.5",
                     Group(2, "red", "circle"), Group(1, "red", "square"))
    assert found == [{"colour", "shape"}] * 4, "the other reading has colour and count right"


# -------------------------------------------------------------------------------------- 5 rewards
def test_lora_alone_learns_and_its_change_is_of_low_rank():
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(8, 8) for name in ("qkv", "proj", "qkv_other", "fc")}
    model = torch.nn.ModuleDict(layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    common.add_lora(model, rank=2)
    x = torch.randn(16, 8)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert len(learned) == 4, "A and B of the layers named qkv and proj"
    optimizer = torch.optim.SGD(learned, lr=0.1)
    for _ in range(3):
        loss = sum((layer(x) - 1).square().mean() for layer in model.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = common.merge_lora(model).state_dict()
    assert after.keys() == before.keys(), "after merging, names are as before"
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"qkv.weight", "proj.weight"}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) == 2
