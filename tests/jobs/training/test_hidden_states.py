"""Hidden states: queries and keys equal those of the attention, blocks are matched evenly, causality holds."""

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


def load_sharpened(folder: Path) -> Model:
    """Load a model whose attention is far from uniform; that of a random model is nearly uniform."""
    model = loading.load(folder)
    paths = model.family.attention
    scale = 20
    if model.family.name == "mobilebert":
        scale = 2000  # the outputs of its bottleneck are small
    for block in model.blocks:
        for path in {paths.query, paths.key}:
            block.get_submodule(path).weight.mul_(scale)
    return model


def read_states(model: Model) -> States:
    with hidden_states.read(model, hidden=True, attention=True) as states, torch.no_grad():
        model.module(ROWS)
    return states


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "distilbert", "mobilebert"])
def test_queries_and_keys_give_the_attention_of_the_last_block(family: str, tiny: Tiny) -> None:
    """For families without rotary embedding, transformers itself returns the attention."""
    model = load_sharpened(tiny(family))
    model.module.float()
    states = read_states(model)
    model.module.set_attn_implementation("eager")
    expected = model.module(ROWS, output_attentions=True).attentions[-1]
    query, key = states.queries_and_keys()
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if states.causal:
        scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    assert (expected.max() - expected.min()) > 0.1
    torch.testing.assert_close(scores.softmax(-1), expected, rtol=1e-3, atol=1e-4)


def test_interleaved_queries_and_keys_are_separated_head_by_head(tiny: Tiny) -> None:
    model = loading.load(tiny("gpt_neox"))
    fused = model.blocks[-1].get_submodule("attention.query_key_value")
    inputs: list[Tensor] = []
    fused.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    query, key = read_states(model).queries_and_keys()
    for head in range(4):
        start = head * 3 * 16
        for offset, projection in ((start, query), (start + 16, key)):
            weight, bias = fused.weight[offset : offset + 16], fused.bias[offset : offset + 16]
            torch.testing.assert_close(
                projection[:, head], nn.functional.linear(inputs[0], weight, bias), rtol=0.02, atol=1e-3
            )


def test_a_key_shared_by_several_queries_is_repeated(tiny: Tiny) -> None:
    query, key = read_states(loading.load(tiny("llama"))).queries_and_keys()
    assert query.shape == key.shape == (2, 4, 12, 16)
    assert torch.equal(key[:, 0], key[:, 1])
    assert not torch.equal(key[:, 1], key[:, 2])


def test_blocks_are_matched_evenly_and_the_last_block_to_the_last() -> None:
    assert hidden_states.counterparts(3, 3) == [0, 1, 2]
    assert hidden_states.counterparts(3, 6) == [1, 3, 5]
    assert hidden_states.counterparts(4, 6) == [1, 2, 4, 5]
    assert hidden_states.counterparts(24, 30)[-1] == 29
    assert hidden_states.counterparts(1, 30) == [29]


@pytest.mark.parametrize("family", ["llama", "bert", "mobilebert"])
def test_the_distance_to_itself_is_zero_and_to_a_smaller_model_positive(family: str, tiny: Tiny) -> None:
    teacher, smaller = load_sharpened(tiny(family)), load_sharpened(tiny(family))
    keep_blocks(smaller, [0, 1])
    same_states, teacher_states, smaller_states = (
        read_states(load_sharpened(tiny(family))),
        read_states(teacher),
        read_states(smaller),
    )
    assert hidden_states.hidden_distance(same_states, teacher_states).item() == 0
    assert abs(hidden_states.attention_distance(same_states, teacher_states).item()) < 1e-6
    assert hidden_states.hidden_distance(smaller_states, teacher_states).item() > 0
    assert hidden_states.attention_distance(smaller_states, teacher_states).item() > 1e-4


def test_the_attention_distance_is_the_mean_divergence_of_the_distributions(tiny: Tiny) -> None:
    """Compute the expected value in a loop over heads and positions with a causal mask."""
    teacher, student = load_sharpened(tiny("llama")), load_sharpened(tiny("llama"))
    keep_blocks(student, [0, 2])
    teacher_states, student_states = read_states(teacher), read_states(student)
    (teacher_q, teacher_k), (student_q, student_k) = (
        teacher_states.queries_and_keys(),
        student_states.queries_and_keys(),
    )

    def attend(query: Tensor, keys: Tensor) -> Tensor:
        return ((keys.float() @ query.float()) / 4).softmax(0)

    parts = []
    for row in range(2):
        for head in range(4):
            for position in range(12):
                goal = attend(teacher_q[row, head, position], teacher_k[row, head, : position + 1])
                probabilities = attend(student_q[row, head, position], student_k[row, head, : position + 1])
                parts.append((goal * (goal / probabilities).log()).sum())
    assert hidden_states.attention_distance(student_states, teacher_states).item() == pytest.approx(
        torch.stack(parts).mean().item(), rel=1e-4
    )


def test_fewer_heads_are_compared_on_average_and_have_finite_gradients(tiny: Tiny) -> None:
    teacher_states, student_states = (
        read_states(load_sharpened(tiny("gpt2"))),
        read_states(load_sharpened(tiny("gpt2"))),
    )
    mixed = student_states.outputs["attn.c_attn"]
    # Remove the last two heads, of width 16, from queries, keys and values.
    narrowed = torch.cat([part[..., :32] for part in mixed.chunk(3, dim=-1)], dim=-1).requires_grad_()
    student_states.outputs["attn.c_attn"] = narrowed
    distance = hidden_states.attention_distance(student_states, teacher_states)
    distance.backward()
    assert distance.item() > 0
    assert torch.isfinite(narrowed.grad).all()  # type: ignore[arg-type]


def test_states_of_different_widths_are_refused_with_both_widths() -> None:
    with pytest.raises(ValueError, match="48 wide and the teacher's 64"):
        hidden_states.state_distance(torch.zeros(1, 2, 48), torch.zeros(1, 2, 64))
