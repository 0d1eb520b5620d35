"""Importance: diagonal Fisher information of weights, and the sensitivity of the loss to errors of linears."""

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
"""Positions whose probabilities are in fp32 at once: as wide as the vocabulary, all of them would fill memory."""
_PROBES = 2
"""Random directions of the outputs in which each sequence's gradient is probed; each takes 4 · in bytes of memory."""
_DAMPING = 0.01
"""Share of the mean diagonal added to a Gram matrix before its inversion, as in gptq."""
_SEED = 0
"""Seed of sampled labels and directions. It is not the study's seed: the cache serves every recipe of one parent."""

_AddGradient = Callable[[Tensor], None]
"""Receives the loss's gradient by the output of a linear, for one sequence."""
_LossGradient = Callable[[Any, Int[Tensor, " tokens"]], tuple[Tensor, Tensor]]
"""From the model's result and the tokens of one sequence: an output tensor, and the loss's gradient by it."""


def fisher(model: Model, context: Context) -> Mapping[str, Tensor]:
    """Return the diagonal Fisher information of each block linear's weight, Float[out, in] in fp32, by full name.

    It approximates the diagonal h of the loss's Hessian: a change d of the weights raises the loss by about
    ½ Σ h d² (LeCun et al. 1989, Optimal Brain Damage, eq. 5). h is the mean over sequences of the squared
    gradient of a loss that depends on the task:

    causal-lm: the cross-entropy of the text's own next tokens (the empirical Fisher), in nats per token: the
        squared gradient of the sequence's summed cross-entropy, over its number of predicted tokens.
    classification: a label drawn from the model's own prediction (the true Fisher), per sequence; one label per
        output if outputs are independent yes or no decisions. A regression is treated as an embedding.
    embedding: half the squared error of the sentence vector v, the mean last hidden state at length 1, which
        is 1 − its cosine with the original's. The Hessian of this error at the original is JᵀJ with J = dv/dw;
        its diagonal is the mean of (Jᵀr)² over random r of ±1 (Hutchinson). One r per sequence is an estimate
        whose noise falls with the number of sequences.

    The result is computed once per parent and text, and read one tensor at a time. The computation needs the
    whole model on its device, the squares of all block linears in fp32 (twice the bytes of their bf16
    weights), and the gradient of one weight at a time. Raises ValueError for packed or sparse linears, for NaN,
    and without calibration text.
    """
    return context.statistics.stored("fisher", lambda: (_fisher(model, context), {}))


def sensitivities(model: Model, context: Context) -> Mapping[str, Tensor]:
    """Return the increase of `fisher`'s loss per unit of each block linear's squared output error, by full name.

    The numbers are right up to a common factor, so that errors of different linears can be added.

    causal-lm: E[g²], with g the loss's gradient by the linear's output and the mean over outputs and tokens. An
        output error e that is independent of g raises the loss by about ½ E[g²] E‖e‖². An estimate of E[g²]
        from the Fisher information of the weights, the mean of (g x)² over the energy of x, gave worse ranks
        for SmolLM2.
    others, which have one loss per sequence: tr(D G⁻¹ Dᵀ) / (outputs · inputs), averaged over sequences.
        D = Σ g xᵀ, over the tokens of a sequence, is the gradient of its loss by the weight, and G = R Rᵀ the Gram
        matrix of the inputs. An error E of the weight raises the loss by about the mean of ½ ⟨D, E⟩²: the
        errors of tokens add up before they are squared, because the gradients of the tokens of a mean are
        nearly equal. Errors of the same energy tr(E G Eᵀ) = ‖E R‖² are assumed to be equally likely in all
        directions of E R, which holds nearly after low rank and error feedback; their mean increase is
        ½ tr(E G Eᵀ) times the returned number. For independent tokens it would be E[g²] times their number.
        benchmarks/LOG.md compares both predictions with the measured cost of single linears of MiniLM, and says
        why SmolLM2 uses the first.

    tr(D G⁻¹ Dᵀ) is estimated with random vectors z of ±1 (Hutchinson), from Dᵀz alone. The result is computed
    once per parent and text. It is cheaper than `fisher`, because no weight needs a gradient. For models that
    are not causal, the inputs of all linears for one sequence are in memory at once, and `_PROBES` vectors of
    their width per sequence.
    """
    if model.task == "causal-lm":
        return context.statistics.stored("sensitivity", lambda: (_of_tokens(model, context), {}))
    return context.statistics.stored("sensitivity-of-sequences", lambda: (_of_sequences(model, context), {}))


def _fisher(model: Model, context: Context) -> dict[str, Tensor]:
    calibration = _calibration(context)
    weights = _dense_weights(model)
    sums = {
        name: torch.zeros_like(weight, dtype=torch.float32, device=model.device)
        for name, weight in weights.items()
    }
    with on_device(model, ""), _add_squared_gradients(weights, sums, model):
        _run_backward(model, calibration, context.report)
    for name, total in sums.items():
        _check_gradients(total.div_(len(calibration)), name)
    return sums


def _of_tokens(model: Model, context: Context) -> dict[str, Tensor]:
    sums = {name: torch.zeros((), dtype=torch.float64) for name in model.linears()}

    def watch(name: str, inputs: Tensor) -> _AddGradient:
        def add(gradient: Tensor) -> None:
            sums[name].add_(gradient.float().square().mean().double().cpu())

        return add

    sequences = _watch_linears(model, context, watch)
    return {name: _check_gradients(total / sequences, name).float() for name, total in sums.items()}


def _of_sequences(model: Model, context: Context) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    probes: dict[str, list[Float[Tensor, "probes in"]]] = {name: [] for name in model.linears()}

    def watch(name: str, inputs: Tensor) -> _AddGradient:
        # Some families pass tokens as rows of a matrix, others with a dimension of one sequence before them.
        tokens = inputs.detach().flatten(end_dim=-2)

        def add(gradient: Tensor) -> None:
            directions = _random_signs(gradient.new_empty(_PROBES, gradient.shape[-1]), generator)
            projected = (gradient.flatten(end_dim=-2) @ directions.T).float()
            probes[name].append((projected.T @ tokens.float()).cpu())

        return add

    _watch_linears(model, context, watch)
    grams = context.statistics.grams(model, _calibration(context), context.report)
    sensitivity = {}
    for name, spec in model.layout().linears.items():
        gram = grams.gram(name).to(model.device)
        # UᵀU = (G + λ)⁻¹: with damping, a direction that the text hardly has counts for less than one input.
        factor = inverse_factor(gram, _DAMPING, "sensitivities")
        inputs = ((factor @ gram) * factor).sum()
        probed = _check_gradients(torch.cat(probes[name]), name).to(model.device)
        squares = (probed @ factor.T).square().sum(dim=1)
        sensitivity[name] = (squares.mean() / (inputs * spec.out_features)).cpu()
    return sensitivity


def _watch_linears(model: Model, context: Context, watch: Callable[[str, Tensor], _AddGradient]) -> int:
    """Run forward and backward passes over the text and return the number of sequences.

    For each linear and sequence, `watch` receives the linear's name and inputs, and returns the function that
    receives the gradient by its output.
    """
    calibration = _calibration(context)

    def forward_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def register(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(watch(name, args[0]))  # type: ignore[no-untyped-call]

        return register

    def require_gradient(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Without a tensor that requires a gradient, autograd would record no graph.
        args[0].requires_grad_(True)

    hooks = [layer.register_forward_hook(forward_hook(name)) for name, layer in model.linears().items()]
    hooks.append(model.blocks[0].register_forward_pre_hook(require_gradient))
    try:
        with on_device(model, ""), _add_squared_gradients({}, {}, model):
            _run_backward(model, calibration, context.report)
    finally:
        for hook in hooks:
            hook.remove()
    return len(calibration)


def _calibration(context: Context) -> Int[Tensor, "samples tokens"]:
    if context.calibration is None:
        raise ValueError("gradients need calibration text; set data.calibration in the study")
    return context.calibration


def _check_gradients(gradients: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(gradients).all()):
        raise ValueError(f"{name} has NaN or infinite gradients on the calibration text")
    return gradients


def _dense_weights(model: Model) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, layer in model.linears().items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"gradients need dense linears: {name} is a {type(layer).__name__}")
        weights[name] = layer.weight
    return weights


@contextmanager
def _add_squared_gradients(
    weights: Mapping[str, Tensor], sums: Mapping[str, Tensor], model: Model
) -> Iterator[None]:
    """Inside the block, each backward pass adds the squared gradients of `weights` to `sums`, then frees them.

    No other parameter of the model gets a gradient.
    """
    requirements = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]

    def add_to(total: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            total.addcmul_(gradient, gradient)
            weight.grad = None

        return add

    model.module.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    hooks = [
        weight.register_post_accumulate_grad_hook(add_to(sums[name]))  # type: ignore[no-untyped-call]
        for name, weight in weights.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, requires_grad in requirements:
            parameter.requires_grad_(requires_grad)


def _run_backward(model: Model, calibration: Int[Tensor, "samples tokens"], report: Report) -> None:
    """Run forward and backward through each sequence."""
    generator = torch.Generator().manual_seed(_SEED)
    loss_gradient = _loss_gradient(model, generator)
    options: dict[str, Any] = {}
    if not model.family.encoder:
        options["use_cache"] = False
    for index, row in enumerate(calibration.to(model.device)):
        report(index / len(calibration), "squared gradients")
        with torch.enable_grad():
            output, gradient = loss_gradient(model.module(row.unsqueeze(0), **options), row)
        output.backward(gradient)  # type: ignore[no-untyped-call]


def _loss_gradient(model: Model, generator: torch.Generator) -> _LossGradient:
    """Return the function that differentiates the loss of the model's task (see `fisher`)."""

    def next_tokens(result: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        logits = result.logits[0, :-1]
        # The squared sum over tokens is divided by their number, so the gradient by the root of it.
        return logits, _cross_entropy_gradient(logits.detach(), row[1:]) / len(logits) ** 0.5

    def single_label(result: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = result.logits.detach().to(_at_least_fp32(result.logits)).softmax(dim=-1)
        label = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(probabilities.device)
        gradient = probabilities.scatter_add(1, label, -torch.ones_like(probabilities))
        return result.logits, gradient.to(result.logits.dtype)

    def multi_label(result: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = result.logits.detach().to(_at_least_fp32(result.logits)).sigmoid()
        labels = torch.bernoulli(probabilities.cpu(), generator=generator).to(probabilities.device)
        return result.logits, (probabilities - labels).to(result.logits.dtype)

    def regression(result: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        return result.logits, _random_signs(result.logits, generator)

    def sentence_vector(result: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        states = result.last_hidden_state
        vector = nn.functional.normalize(states.to(_at_least_fp32(states)).mean(dim=1), dim=-1)
        return vector, _random_signs(vector, generator)

    if model.task == "causal-lm":
        return next_tokens
    if model.task == "embedding":
        return sentence_vector
    kind = model.config.problem_type
    if not kind and int(model.config.num_labels or 1) == 1:
        kind = "regression"
    return {"regression": regression, "multi_label_classification": multi_label}.get(kind, single_label)


def _cross_entropy_gradient(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocabulary"]:
    """Return the gradient of the summed cross-entropy, softmax − onehot, in the dtype of the logits."""
    gradient = torch.empty_like(logits)
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        probabilities = logits[rows].to(_at_least_fp32(logits)).softmax(dim=-1)
        probabilities.scatter_add_(1, targets[rows].unsqueeze(1), -torch.ones_like(probabilities[:, :1]))
        gradient[rows] = probabilities
    return gradient


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random ±1 with the shape, dtype and device of `like`."""
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
