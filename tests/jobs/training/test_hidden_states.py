"""States: queries and keys are those that the model attends with, blocks are matched evenly, and nothing sees ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.models import loading
from jobs.models.model import Model
from jobs.techniques.drop_layers import keep_blocks
from jobs.training import hidden_states
from jobs.training.hidden_states import States

Tiny = Callable[..., Path]
ROWS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(0))


def sharpened(folder: Path) -> Model:
    """A model that attends to something: a random one looks everywhere alike."""
    model = loading.load(folder)
    paths = model.family.attention
    scale = 2000 if model.family.name == "mobilebert" else 20  # its bottleneck is nearly silent
    for block in model.blocks:
        for path in {paths.query, paths.key}:
            block.get_submodule(path).weight.mul_(scale)
    return model


def seen(model: Model) -> States:
    with hidden_states.read(model, hidden=True, attention=True) as found, torch.no_grad():
        model.module(ROWS)
    return found


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "distilbert", "mobilebert"])
def test_queries_and_keys_give_the_attention_of_the_last_block(family: str, tiny: Tiny) -> None:
    """Of families without rotary embedding transformers can tell the attention itself."""
    model = sharpened(tiny(family))
    model.module.float()
    found = seen(model)
    model.module.set_attn_implementation("eager")
    expected = model.module(ROWS, output_attentions=True).attentions[-1]
    query, key = found.queries_and_keys()
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if found.causal:
        scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    assert (expected.max() - expected.min()) > 0.1
    torch.testing.assert_close(scores.softmax(-1), expected, rtol=1e-3, atol=1e-4)


def test_interleaved_queries_and_keys_are_cut_out_head_by_head(tiny: Tiny) -> None:
    model = loading.load(tiny("gpt_neox"))
    fused = model.blocks[-1].get_submodule("attention.query_key_value")
    inputs: list[Tensor] = []
    fused.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    query, key = seen(model).queries_and_keys()
    for head in range(4):
        start = head * 3 * 16
        for place, found in ((start, query), (start + 16, key)):
            weight, bias = fused.weight[place : place + 16], fused.bias[place : place + 16]
            torch.testing.assert_close(
                found[:, head], nn.functional.linear(inputs[0], weight, bias), rtol=0.02, atol=1e-3
            )


def test_a_key_that_several_queries_share_is_repeated_for_them(tiny: Tiny) -> None:
    query, key = seen(loading.load(tiny("llama"))).queries_and_keys()
    assert query.shape == key.shape == (2, 4, 12, 16)
    assert torch.equal(key[:, 0], key[:, 1])
    assert not torch.equal(key[:, 1], key[:, 2])


def test_blocks_are_matched_evenly_and_the_last_to_the_last() -> None:
    assert hidden_states.counterparts(3, 3) == [0, 1, 2]
    assert hidden_states.counterparts(3, 6) == [1, 3, 5]
    assert hidden_states.counterparts(4, 6) == [1, 2, 4, 5]
    assert hidden_states.counterparts(24, 30)[-1] == 29
    assert hidden_states.counterparts(1, 30) == [29]


@pytest.mark.parametrize("family", ["llama", "bert", "mobilebert"])
def test_a_model_is_at_no_distance_from_itself_and_at_some_from_a_smaller_one(
    family: str, tiny: Tiny
) -> None:
    teacher, smaller = sharpened(tiny(family)), sharpened(tiny(family))
    keep_blocks(smaller, [0, 1])
    same, others, left = seen(sharpened(tiny(family))), seen(teacher), seen(smaller)
    assert hidden_states.hidden_distance(same, others).item() == 0
    assert abs(hidden_states.attention_distance(same, others).item()) < 1e-6
    assert hidden_states.hidden_distance(left, others).item() > 0
    assert hidden_states.attention_distance(left, others).item() > 1e-4


def test_the_attention_distance_is_the_mean_divergence_of_the_distributions(tiny: Tiny) -> None:
    """By hand: a loop over heads and positions, each seeing what came before."""
    teacher, student = sharpened(tiny("llama")), sharpened(tiny("llama"))
    keep_blocks(student, [0, 2])
    others, own = seen(teacher), seen(student)
    (goal_q, goal_k), (said_q, said_k) = others.queries_and_keys(), own.queries_and_keys()
    parts = []
    for row in range(2):
        for head in range(4):
            for position in range(12):
                goal, said = (
                    (
                        (keys[row, head, : position + 1].float() @ queries[row, head, position].float()) / 4
                    ).softmax(0)
                    for queries, keys in ((goal_q, goal_k), (said_q, said_k))
                )
                parts.append((goal * (goal / said).log()).sum())
    assert hidden_states.attention_distance(own, others).item() == pytest.approx(
        torch.stack(parts).mean().item(), rel=1e-4
    )


def test_fewer_heads_are_compared_on_average_and_have_finite_gradients(tiny: Tiny) -> None:
    others, own = seen(sharpened(tiny("gpt2"))), seen(sharpened(tiny("gpt2")))
    mixed = own.outputs["attn.c_attn"]
    # Without the last two heads of 16, in each of queries, keys and values.
    less = torch.cat([part[..., :32] for part in mixed.chunk(3, dim=-1)], dim=-1).requires_grad_()
    own.outputs["attn.c_attn"] = less
    distance = hidden_states.attention_distance(own, others)
    distance.backward()
    assert distance.item() > 0
    assert torch.isfinite(less.grad).all()  # type: ignore[arg-type]


def test_states_of_different_widths_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match="48 wide and the teacher's 64"):
        hidden_states.state_distance(torch.zeros(1, 2, 48), torch.zeros(1, 2, 64))
