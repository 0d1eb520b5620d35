"""Record hidden states, queries and keys of a model while it runs, and compare a student's with a teacher's."""

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
    """The hidden states after each block, and the queries and keys of the last block, of the last forward pass.

    Queries and keys are outputs of their linears: before rotary embedding, and before any norm.
    """

    def __init__(self, model: Model) -> None:
        self.causal = not model.family.encoder
        self.hidden: dict[int, Float[Tensor, "batch tokens width"]] = {}
        self._paths = model.family.attention
        self._head_width = model.head_width
        self.outputs: dict[str, Tensor] = {}
        """Outputs of the linears of queries and keys, by path."""

    def forget(self) -> None:
        """Release the recorded tensors and their autograd graph."""
        self.hidden.clear()
        self.outputs.clear()

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Return queries and keys, each [batch, heads, tokens, head width]. Keys of several queries are repeated."""
        paths, width = self._paths, self._head_width
        if paths.fused is None:
            query, key = (_by_heads(self.outputs[path], width) for path in (paths.query, paths.key))
        else:
            mixed = self.outputs[paths.query]
            if paths.fused == "stacked":
                query, key, _ = (_by_heads(part, width) for part in mixed.chunk(3, dim=-1))
            else:
                heads = _by_heads(mixed, 3 * width)
                query, key = heads[..., :width], heads[..., width : 2 * width]
        return query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@contextmanager
def read(model: Model, *, hidden: bool, attention: bool) -> Iterator[States]:
    """Record the states of every forward pass of `model` until the end of the `with` block."""
    states = States(model)
    hooks = []

    def record_hidden(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple):
                output = output[0]
            states.hidden[index] = output

        return hook

    def record_output(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            states.outputs[path] = output

        return hook

    if hidden:
        hooks += [
            block.register_forward_hook(record_hidden(index)) for index, block in enumerate(model.blocks)
        ]
    if attention:
        paths = model.family.attention
        for path in sorted({paths.query, paths.key}):
            hooks.append(model.blocks[-1].get_submodule(path).register_forward_hook(record_output(path)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _by_heads(output: Float[Tensor, "batch tokens width"], head_width: int) -> Tensor:
    """Return a tensor of shape [batch, heads, tokens, head width]."""
    batch, tokens, _ = output.shape
    return output.view(batch, tokens, -1, head_width).transpose(1, 2)


def counterparts(student: int, teacher: int) -> list[int]:
    """Return the teacher's block that each of the student's blocks matches.

    They are spaced evenly, and the last block matches the last one (the uniform strategy of TinyBERT,
    arXiv:1909.10351, and PKD-skip, arXiv:1908.09355). With equal numbers of blocks, each matches the same block.
    """
    return [math.ceil((index + 1) * teacher / student) - 1 for index in range(student)]


def hidden_distance(student: States, teacher: States) -> Float[Tensor, ""]:
    """Return the mean of `state_distance` over the student's blocks and their counterparts."""
    distances = []
    for index, counterpart in enumerate(counterparts(len(student.hidden), len(teacher.hidden))):
        distances.append(state_distance(student.hidden[index], teacher.hidden[counterpart]))
    return torch.stack(distances).mean()


def state_distance(
    student: Float[Tensor, "batch tokens width"], teacher: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, ""]:
    """Return the mean squared error between states, each normalised over its width.

    Raises ValueError if the widths differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's hidden states are {student.shape[-1]} wide and the teacher's {teacher.shape[-1]}: "
            f"states of different widths cannot be matched (hidden_weight must be 0, and an encoder cannot "
            f"be distilled)"
        )
    return nn.functional.mse_loss(_normalised(student), _normalised(teacher))


def attention_distance(student: States, teacher: States) -> Float[Tensor, ""]:
    """Return KL(teacher ‖ student) of softmax(QKᵀ/√d) in the last blocks, the mean over heads and positions.

    Wang et al. 2020, MiniLM, arXiv:2002.10957, eq. 5 and 6. The attention of a decoder is causal. If heads were
    removed, the remaining ones have no counterparts, so the distributions are averaged over all heads first.
    """
    student_logs, teacher_logs = _relations(student), _relations(teacher)
    if student_logs.shape[1] != teacher_logs.shape[1]:
        student_logs, teacher_logs = _mean_over_heads(student_logs), _mean_over_heads(teacher_logs)
    # Masked positions have probability 0 and logarithm -inf in both, and contribute nothing.
    difference = teacher_logs - student_logs.masked_fill(student_logs.isinf(), 0)
    divergence = torch.where(teacher_logs.isinf(), 0, teacher_logs.exp() * difference)
    return divergence.sum(dim=-1).mean()


def _relations(states: States) -> Float[Tensor, "batch heads tokens tokens"]:
    """Return the logarithms of the attention distributions, in fp32; -inf at masked positions."""
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
