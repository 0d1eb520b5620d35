"""States: what a model thinks on the way, read while it runs, and how far a student's are from a teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jobs.models.model import Model


class States:
    """Of the last forward pass: the hidden state that each block left, and the queries and keys of the last
    block, [batch, heads, tokens, head width]. Keys that several queries share are repeated.

    Queries and keys are as their linears give them: before rotary embedding, and before any norm of theirs.
    """

    def __init__(self, model: Model) -> None:
        self.causal = not model.family.encoder
        self.hidden: dict[int, Float[Tensor, "batch tokens width"]] = {}
        self._paths = model.family.attention
        self._head_width = model.head_width
        self.given: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Let go of what was read, and of the graph that it hangs on."""
        self.hidden.clear()
        self.given.clear()

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        paths, width = self._paths, self._head_width
        if paths.fused is None:
            query, key = (_by_heads(self.given[path], width) for path in (paths.query, paths.key))
        else:
            mixed = self.given[paths.query]
            if paths.fused == "stacked":
                query, key, _ = (_by_heads(part, width) for part in mixed.chunk(3, dim=-1))
            else:
                heads = _by_heads(mixed, 3 * width)
                query, key = heads[..., :width], heads[..., width : 2 * width]
        return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@contextmanager
def read(model: Model, *, hidden: bool, attention: bool) -> Iterator[States]:
    """The states of every forward pass of `model` until the end of the block."""
    states = States(model)
    hooks = []

    def keep_hidden(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states.hidden[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_given(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            states.given[path] = output

        return hook

    if hidden:
        hooks += [block.register_forward_hook(keep_hidden(index)) for index, block in enumerate(model.blocks)]
    if attention:
        paths = model.family.attention
        for path in sorted({paths.query, paths.key}):
            hooks.append(model.blocks[-1].get_submodule(path).register_forward_hook(keep_given(path)))
    try:
        yield states
    finally:
        for one in hooks:
            one.remove()


def _by_heads(given: Float[Tensor, "batch tokens width"], head_width: int) -> Tensor:
    """[batch, heads, tokens, head width]"""
    batch, tokens, _ = given.shape
    return given.view(batch, tokens, -1, head_width).transpose(1, 2)


def counterparts(student: int, teacher: int) -> list[int]:
    """For each of a student's blocks, the teacher's to match: spaced evenly, the last to the last (the
    uniform strategy of TinyBERT, arXiv:1909.10351, and PKD-skip, arXiv:1908.09355). With as many blocks it
    is each its own."""
    return [math.ceil((index + 1) * teacher / student) - 1 for index in range(student)]


def hidden_distance(student: States, teacher: States) -> Float[Tensor, ""]:
    """The mean over the student's blocks of the mean squared error between the hidden states that they and
    their counterparts leave, each normalised over its width. ValueError where the widths differ."""
    pairs = enumerate(counterparts(len(student.hidden), len(teacher.hidden)))
    return torch.stack(
        [state_distance(student.hidden[own], teacher.hidden[other]) for own, other in pairs]
    ).mean()


def state_distance(
    student: Float[Tensor, "batch tokens width"], teacher: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, ""]:
    """The mean squared error between states, each normalised over its width."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's hidden states are {student.shape[-1]} wide and the teacher's {teacher.shape[-1]}: "
            f"states of different widths cannot be matched (hidden_weight must be 0, and an encoder cannot "
            f"be distilled)"
        )
    return nn.functional.mse_loss(_normalised(student), _normalised(teacher))


def attention_distance(student: States, teacher: States) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) of softmax(QKᵀ/√d) in the last blocks (Wang et al. 2020, MiniLM, arXiv:2002.10957,
    eq. 5 and 6), the mean over heads and positions. A decoder's positions see only what came before.

    Where heads were removed, those that are left have no counterparts: the distributions are averaged over
    all heads first.
    """
    said, goal = _relations(student), _relations(teacher)
    if said.shape[1] != goal.shape[1]:
        said, goal = (_mean_over_heads(relation) for relation in (said, goal))
    # What is masked has probability 0 and logarithm -inf in both, and adds nothing.
    apart = torch.where(goal.isinf(), 0, goal.exp() * (goal - said.masked_fill(said.isinf(), 0)))
    return apart.sum(dim=-1).mean()


def _relations(states: States) -> Float[Tensor, "batch heads tokens tokens"]:
    """The logarithms of the attention distributions, in fp32; -inf where a position may not look."""
    query, key = states.queries_and_keys()
    scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    if states.causal:
        tokens = scores.shape[-1]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.log_softmax(dim=-1)


def _mean_over_heads(logs: Float[Tensor, "batch heads tokens tokens"]) -> Tensor:
    # The logarithm of an exact zero would have an infinite gradient.
    return logs.exp().mean(dim=1, keepdim=True).clamp(min=torch.finfo(logs.dtype).tiny).log()


def _normalised(states: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
    return nn.functional.layer_norm(states.float(), states.shape[-1:])
