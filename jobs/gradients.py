"""Gradients: the diagonal Fisher information of the blocks' weights, one sequence of calibration text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.context import Context, Report
from jobs.model import Model
from jobs.residency import resident

_ROWS = 128
"""Positions whose probabilities are held in fp32 at once: a vocabulary wide, they would fill memory."""
_SEED = 0
"""Of sampled labels and directions. Not the study's: what is kept serves every recipe of one parent."""


def fisher(model: Model, context: Context) -> Mapping[str, Tensor]:
    """The diagonal of the Fisher information of each block linear's weight, Float[out, in] in fp32, by name.

    It stands for the diagonal h of the loss's Hessian: a change d of the weights raises the loss by about
    ½ Σ h d² (LeCun et al. 1989, Optimal Brain Damage, eq. 5). h is the mean over sequences of the squared
    gradient, one sequence at a time, of what the model itself is trained for, or compared by:

    causal-lm: the text's own next tokens (the empirical Fisher), per token: the gradient of the sequence's
        summed cross-entropy, squared, over its number of predicted tokens. Loss in nats per token.
    classification: a label drawn from the model's own prediction (the true Fisher), per sequence; one per
        output where each is a yes or no of its own. A regression counts as an embedding.
    embedding: there is no loss, so half the squared error of the sentence vector v (the mean last hidden
        state at length 1) is taken, which is 1 − the cosine with the original's. Its Hessian at the
        original is JᵀJ with J = dv/dw; (Jᵀr)² with a random r of ±1 has its diagonal for a mean
        (Hutchinson). One r a sequence: an estimate, whose noise falls as sequences are added.

    Computed once for each parent and text, and then read one tensor at a time. While it is computed, the
    whole model lies on its device, with the squares of all block linears in fp32, twice the bytes of their
    bf16 weights, and the gradient of one weight at a time. Raises ValueError for linears that are packed or
    sparse, and for NaN.
    """
    return context.statistics.stored("fisher", lambda: (_fisher(model, context), {}))


def sensitivities(model: Model, context: Context) -> Mapping[str, Tensor]:
    """E[g²] of each block linear, a number by its name: g is the loss's gradient by what the linear gives,
    the mean is over its outputs and all tokens. The loss is `fisher`'s.

    An error e of the outputs that is independent of g raises the loss by about ½ E[g²] E‖e‖², so errors of
    different linears can be added. Read off the Fisher information of the weights instead, a mean of
    (g x)² over the energy of x, it chose worse ranks for SmolLM2.

    Computed once for each parent and text; cheaper than `fisher`, since no weight gets a gradient.
    """
    return context.statistics.stored("sensitivity", lambda: (_sensitivities(model, context), {}))


def _sensitivities(model: Model, context: Context) -> dict[str, Tensor]:
    if context.calibration is None:
        raise ValueError("gradients need a text to be taken on; give the study data.calibration")
    sums = {name: torch.zeros((), dtype=torch.float64) for name in model.linears()}

    def reads(total: Tensor) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(slope: Tensor) -> None:
            total.add_(slope.float().square().mean().double().cpu())

        def given(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return given

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Gradients start here: without one that asks for them, no graph would be kept.
        args[0].requires_grad_(True)

    hooks = [layer.register_forward_hook(reads(sums[name])) for name, layer in model.linears().items()]
    hooks.append(model.blocks[0].register_forward_pre_hook(enter))
    try:
        with resident(model, ""), _squares_into({}, {}, model):
            _run(model, context.calibration, context.report)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        if not bool(torch.isfinite(total.div_(len(context.calibration)))):
            raise ValueError(f"{name} has NaN or infinite gradients on the calibration text")
    return {name: total.float() for name, total in sums.items()}


def _fisher(model: Model, context: Context) -> dict[str, Tensor]:
    if context.calibration is None:
        raise ValueError("gradients need a text to be taken on; give the study data.calibration")
    weights = _weights(model)
    sums = {
        name: torch.zeros_like(weight, dtype=torch.float32, device=model.device)
        for name, weight in weights.items()
    }
    with resident(model, ""), _squares_into(weights, sums, model):
        _run(model, context.calibration, context.report)
    for name, total in sums.items():
        if not bool(torch.isfinite(total.div_(len(context.calibration))).all()):
            raise ValueError(f"{name} has NaN or infinite gradients on the calibration text")
    return sums


def _weights(model: Model) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in model.linears().items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"gradients are taken of dense linears: {name} is a {type(layer).__name__}")
        found[name] = layer.weight
    return found


@contextmanager
def _squares_into(weights: Mapping[str, Tensor], sums: Mapping[str, Tensor], model: Model) -> Iterator[None]:
    """While it lasts, each backward pass adds the squared gradients of `weights` to `sums`, and keeps none."""
    required = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]

    def into(total: Tensor) -> Callable[[Tensor], None]:
        def square(weight: Tensor) -> None:
            assert weight.grad is not None
            slope = weight.grad.float()
            total.addcmul_(slope, slope)
            weight.grad = None

        return square

    model.module.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    hooks = [
        weight.register_post_accumulate_grad_hook(into(sums[name]))  # type: ignore[no-untyped-call]
        for name, weight in weights.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in required:
            parameter.requires_grad_(before)


def _run(model: Model, calibration: Int[Tensor, "samples tokens"], report: Report) -> None:
    generator = torch.Generator().manual_seed(_SEED)
    slope_of = _slopes(model, generator)
    options = {} if model.family.encoder else {"use_cache": False}
    for done, row in enumerate(calibration.to(model.device)):
        report(done / len(calibration), "squared gradients")
        with torch.enable_grad():
            output, slope = slope_of(model.module(row.unsqueeze(0), **options), row)
        output.backward(slope)  # type: ignore[no-untyped-call]


_Slopes = Callable[[Any, Int[Tensor, " tokens"]], tuple[Tensor, Tensor]]
"""From what the model gave for one sequence: the output to go back from, and the loss's gradient by it."""


def _slopes(model: Model, generator: torch.Generator) -> _Slopes:
    def next_tokens(given: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        logits = given.logits[0, :-1]
        # The square of the sum over tokens, over their number: a gradient over the root of the number.
        return logits, _cross_entropy_slope(logits.detach(), row[1:]) / len(logits) ** 0.5

    def one_label(given: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        shares = given.logits.detach().to(_wide(given.logits)).softmax(dim=-1)
        label = torch.multinomial(shares.cpu(), 1, generator=generator).to(shares.device)
        return given.logits, shares.scatter_add(1, label, -torch.ones_like(shares)).to(given.logits.dtype)

    def many_labels(given: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        shares = given.logits.detach().to(_wide(given.logits)).sigmoid()
        labels = torch.bernoulli(shares.cpu(), generator=generator).to(shares.device)
        return given.logits, (shares - labels).to(given.logits.dtype)

    def numbers(given: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        return given.logits, _signs(given.logits, generator)

    def vector(given: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        states = given.last_hidden_state
        found = nn.functional.normalize(states.to(_wide(states)).mean(dim=1), dim=-1)
        return found, _signs(found, generator)

    if model.task == "causal-lm":
        return next_tokens
    if model.task == "embedding":
        return vector
    outputs = int(model.config.num_labels or 1)
    kind = model.config.problem_type or ("regression" if outputs == 1 else "single_label_classification")
    return {"regression": numbers, "multi_label_classification": many_labels}.get(kind, one_label)


def _cross_entropy_slope(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocabulary"]:
    """The gradient of the summed cross-entropy, softmax − onehot, in the logits' dtype."""
    slope = torch.empty_like(logits)
    for at in range(0, len(logits), _ROWS):
        rows = slice(at, at + _ROWS)
        shares = logits[rows].to(_wide(logits)).softmax(dim=-1)
        shares.scatter_add_(1, targets[rows].unsqueeze(1), -torch.ones_like(shares[:, :1]))
        slope[rows] = shares
    return slope


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """As many fair ±1 as `like` has numbers."""
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
