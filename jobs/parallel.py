"""Sharing: over how many ranks a training is spread, what they share out, and how many rows each takes at once.

By arithmetic alone, from the size of the model and the memory of one device.
"""

from __future__ import annotations

from dataclasses import dataclass

HIGHEST_STAGE = 3
WORKER_GIB = 0.6
"""What a worker's libraries take before any model is loaded."""
_BESIDE = 4.0
"""Bytes a weight that every rank holds whole: the teacher in bf16, and as much for activations and buffers."""
_FREE_SHARE = 0.5
"""Of the memory that is free beside weights and optimizer activations may fill so much: their estimate is rough."""
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}
"""The most tokens of one forward pass: beyond, a device gains nothing, and gathering over several costs no memory."""


@dataclass(frozen=True)
class Sharing:
    """How trainings are shared out; what is None is chosen by the memory of the devices.

    zero_stage: see `jobs.training.engine.Training`. micro_batch: rows of one forward pass. device_gib: the memory of
    one rank.
    """

    zero_stage: int | None = None
    micro_batch: int | None = None
    device_gib: float | None = None

    def stage(self, weights: int, ranks: int, device_gib: float, highest: int = HIGHEST_STAGE) -> int:
        """The ZeRO stage: the lowest at which this many weights, all trained, fit a device, or else the highest.
        ValueError where the study asks for one above `highest`."""
        if self.zero_stage is not None:
            if self.zero_stage > highest:
                raise ValueError(
                    f"cluster.zero_stage={self.zero_stage} takes weights apart, which this training reads whole; "
                    f"it takes a stage up to {highest}"
                )
            return self.zero_stage
        if ranks == 1:
            return 0
        fit = (stage for stage in range(highest) if training_gib(weights, stage, ranks) <= device_gib)
        return next(fit, highest)


def bytes_per_weight(stage: int, ranks: int) -> float:
    """What each rank holds for each trained weight: 2 bytes of the weight, 2 of its gradient, and K = 12 of its fp32
    copy and Adam's two moments, of which stage 1 shares out the last, 2 the gradients as well, and 3 all (Rajbhandari
    et al. 2020, ZeRO, arXiv:1910.02054, fig. 1); and what is not shared out."""
    weights, gradients, states = 2.0, 2.0, 12.0
    states /= ranks if stage >= 1 else 1
    gradients /= ranks if stage >= 2 else 1
    weights /= ranks if stage >= 3 else 1
    return weights + gradients + states + _BESIDE


def training_gib(weights: int, stage: int, ranks: int) -> float:
    """About the memory that each rank takes to train a model of this many weights."""
    return WORKER_GIB + bytes_per_weight(stage, ranks) * weights / 2**30


def ranks_for(weights: int, device_gib: float, most: int, highest: int = HIGHEST_STAGE) -> int:
    """The fewest ranks whose devices hold a training at any stage up to `highest`; `most` where even so many do not."""
    fit = (ranks for ranks in range(1, most) if training_gib(weights, highest, ranks) <= device_gib)
    return next(fit, most)


def rows_at_once(
    batch: int, ranks: int, tokens: int, kind: str, row_bytes: float, free_bytes: float, asked: int | None
) -> int:
    """How many rows of `tokens` a rank takes through one forward pass: a divisor of the batch, the largest that fits
    where `asked` does not say how many at most; one where not even that fits.

    kind: of the device, cpu or cuda. Where the batch is large enough each rank gets a part of it, of the same number
    of passes if it can be.
    """
    fitting = min(_TOKENS_AT_ONCE[kind] // tokens, int(_FREE_SHARE * free_bytes // row_bytes))
    limit = max(1, min(fitting if asked is None else asked, batch // ranks))
    divisors = [rows for rows in range(limit, 0, -1) if batch % rows == 0]
    return next((rows for rows in divisors if batch // rows % ranks == 0), divisors[0])


def row_bytes(tokens: int, widths: int, outputs: int) -> float:
    """About the activations of one row that its backward pass needs, without attention's squares, which fused kernels
    do not keep. In bf16 what each linear is given and gives (`widths`, the sum over all; of a GPT block that is 32
    times its width, where Korthikanti et al. 2022, arXiv:2205.05198, eq. 2, count 34), and of the `outputs` logits
    a gradient and the teacher's as well."""
    return tokens * (2.0 * widths + 6.0 * outputs)
