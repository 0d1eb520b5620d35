"""Gradients: the diagonal Fisher information of the blocks' weights, one sequence of calibration text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jobs.calibration.hessian import inverse_factor
from jobs.context import Context
from jobs.models.model import Model
from jobs.models.placement import on_device
from jobs.progress import Report

_ROWS = 128
"""Positions whose probabilities are held in fp32 at once: a vocabulary wide, they would fill memory."""
_PROBES = 2
"""Random directions of the outputs that each sequence's gradient is seen from, whose inputs' side is held for all."""
_DAMPING = 0.01
"""Share of the mean diagonal added to a Gram matrix before it is inverted, as much as in gptq."""
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
    """What a unit of each block linear's squared output error adds to `fisher`'s loss, a number by its name, up to
    a factor that all have in common: by it errors of different linears can be added.

    causal-lm: E[g²], g being the loss's gradient by what the linear gives, the mean is over its outputs and
        all tokens. An error e of the outputs that is independent of g raises the loss by about ½ E[g²] E‖e‖².
        Read off the Fisher information of the weights instead, a mean of (g x)² over the energy of x, it
        chose worse ranks for SmolLM2.
    others, which have one loss a sequence: tr(D G⁻¹ Dᵀ) / (outputs · inputs), its mean over sequences.
        D = Σ g xᵀ, over a sequence's tokens, is the gradient of its loss by the weight, G = R Rᵀ the Gram matrix
        of the inputs. An error E of the weight raises the loss by about the mean of ½ ⟨D, E⟩²: errors of tokens
        are added before they are squared, since in a mean over tokens, whose gradients are nearly alike,
        they are not independent of each other. Errors of one energy tr(E G Eᵀ) = ‖E R‖² are taken to be
        equally likely in all directions of E R, as what low rank and error feedback leave nearly is, and the mean
        over them is ½ tr(E G Eᵀ) times this. For independent tokens it would be their number times E[g²].
        benchmarks/LOG.md has how well either foretells what single linears cost MiniLM, and why SmolLM2
        keeps the first.

    tr(D G⁻¹ Dᵀ) is estimated by random vectors z of ±1 (Hutchinson), from Dᵀz alone. Computed once for each
    parent and text; cheaper than `fisher`, since no weight gets a gradient. For other models than causal
    ones what every linear reads of one sequence is held meanwhile, and two vectors as long for each sequence.
    """
    if model.task == "causal-lm":
        return context.statistics.stored("sensitivity", lambda: (_of_tokens(model, context), {}))
    return context.statistics.stored("sensitivity-of-sequences", lambda: (_of_sequences(model, context), {}))


def _of_tokens(model: Model, context: Context) -> dict[str, Tensor]:
    sums = {name: torch.zeros((), dtype=torch.float64) for name in model.linears()}

    def watch(name: str, inputs: Tensor) -> _Slope:
        def add(slope: Tensor) -> None:
            sums[name].add_(slope.float().square().mean().double().cpu())

        return add

    rows = _watched(model, context, watch)
    return {name: _checked(total / rows, name).float() for name, total in sums.items()}


def _of_sequences(model: Model, context: Context) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    probed: dict[str, list[Float[Tensor, "probes in"]]] = {name: [] for name in model.linears()}

    def watch(name: str, inputs: Tensor) -> _Slope:
        # Some families give tokens as rows of a matrix, others with the one sequence before them.
        tokens = inputs.detach().flatten(end_dim=-2)

        def add(slope: Tensor) -> None:
            ways = _signs(slope.new_empty(_PROBES, slope.shape[-1]), generator)
            seen = (slope.flatten(end_dim=-2) @ ways.T).float()
            probed[name].append((seen.T @ tokens.float()).cpu())

        return add

    _watched(model, context, watch)
    assert context.calibration is not None
    grams = context.statistics.grams(model, context.calibration, context.report)
    found = {}
    for name, spec in model.layout().linears.items():
        gram = grams.gram(name).to(model.device)
        # UᵀU = (G + λ)⁻¹: a direction that the text hardly has, damped, counts for less than one.
        factor = inverse_factor(gram, _DAMPING, "sensitivities")
        inputs = ((factor @ gram) * factor).sum()
        seen = _checked(torch.cat(probed[name]), name).to(model.device)
        squares = (seen @ factor.T).square().sum(dim=1)
        found[name] = (squares.mean() / (inputs * spec.out_features)).cpu()
    return found


_Slope = Callable[[Tensor], None]
"""Told the loss's gradient by what a linear gave for one sequence."""


def _watched(model: Model, context: Context, watch: Callable[[str, Tensor], _Slope]) -> int:
    """Run the text; `watch` is told each linear's name and inputs, and says who is told of its slope. The number of
    sequences."""
    if context.calibration is None:
        raise ValueError("gradients need a text to be taken on; give the study data.calibration")

    def reads(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def given(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(watch(name, args[0]))  # type: ignore[no-untyped-call]

        return given

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Gradients start here: without one that asks for them, no graph would be kept.
        args[0].requires_grad_(True)

    hooks = [layer.register_forward_hook(reads(name)) for name, layer in model.linears().items()]
    hooks.append(model.blocks[0].register_forward_pre_hook(enter))
    try:
        with on_device(model, ""), _squares_into({}, {}, model):
            _run(model, context.calibration, context.report)
    finally:
        for hook in hooks:
            hook.remove()
    return len(context.calibration)


def _checked(gradients: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(gradients).all()):
        raise ValueError(f"{name} has NaN or infinite gradients on the calibration text")
    return gradients


def _fisher(model: Model, context: Context) -> dict[str, Tensor]:
    if context.calibration is None:
        raise ValueError("gradients need a text to be taken on; give the study data.calibration")
    weights = _weights(model)
    sums = {
        name: torch.zeros_like(weight, dtype=torch.float32, device=model.device)
        for name, weight in weights.items()
    }
    with on_device(model, ""), _squares_into(weights, sums, model):
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
