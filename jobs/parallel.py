"""How a training is divided among ranks: the number of ranks, the ZeRO stage, and the rows of a forward pass.

Pure arithmetic on the size of the model and the memory of one device.
"""

from __future__ import annotations

from dataclasses import dataclass

HIGHEST_STAGE = 3
WORKER_GIB = 0.6
"""Memory of a worker's libraries before a model is loaded, measured with torch on a CPU."""
_REPLICATED_BYTES = 4.0
"""Bytes per weight that every rank holds in full: the teacher in bf16, and as much for activations and buffers."""
_FREE_SHARE = 0.5
"""Share of the memory left by weights and optimizer that activations may fill: their estimate is rough."""
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}
"""Maximum number of tokens of one forward pass: larger passes are no faster, and accumulating costs no memory."""


@dataclass(frozen=True)
class Sharing:
    """How training is divided among ranks. A value of None is chosen by the memory of the devices."""

    zero_stage: int | None = None
    """ZeRO stage, see `jobs.training.settings.Training`."""
    micro_batch: int | None = None
    """Rows of one forward pass."""
    device_gib: float | None = None
    """Memory of one rank."""

    def stage(self, weights: int, ranks: int, device_gib: float, highest: int = HIGHEST_STAGE) -> int:
        """Return the lowest ZeRO stage at which a training of this many weights fits a device, or `highest`.

        Raises ValueError if the study sets a stage above `highest`.
        """
        if self.zero_stage is not None:
            if self.zero_stage > highest:
                raise ValueError(
                    f"cluster.zero_stage={self.zero_stage} divides weights, and this training reads whole weights; "
                    f"expected a stage of at most {highest}"
                )
            return self.zero_stage
        if ranks == 1:
            return 0
        for stage in range(highest):
            if training_gib(weights, stage, ranks) <= device_gib:
                return stage
        return highest


def bytes_per_weight(stage: int, ranks: int) -> float:
    """Return the bytes that each rank holds per trained weight.

    A weight takes 2 bytes, its gradient 2, and its fp32 copy with Adam's two moments K = 12. Stage 1 divides the last
    among the ranks, stage 2 the gradients too, stage 3 everything (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054,
    fig. 1). Replicated bytes are added.
    """
    weights, gradients, states = 2.0, 2.0, 12.0
    if stage >= 1:
        states /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    return weights + gradients + states + _REPLICATED_BYTES


def training_gib(weights: int, stage: int, ranks: int) -> float:
    """Return the approximate memory of each rank in a training of this many weights."""
    return WORKER_GIB + bytes_per_weight(stage, ranks) * weights / 2**30


def ranks_for(weights: int, device_gib: float, max_ranks: int, highest: int = HIGHEST_STAGE) -> int:
    """Return the smallest number of ranks whose devices hold a training at a stage up to `highest`, or `max_ranks`."""
    for ranks in range(1, max_ranks):
        if training_gib(weights, highest, ranks) <= device_gib:
            return ranks
    return max_ranks


def rows_at_once(
    batch: int,
    ranks: int,
    tokens: int,
    kind: str,
    row_bytes: float,
    free_bytes: float,
    micro_batch: int | None,
) -> int:
    """Return the number of rows of `tokens` in one forward pass of a rank: a divisor of the batch, at least 1.

    It is at most `micro_batch`, or the largest that fits if that is None. If the batch is large enough, each rank gets
    a part of it, and the same number of passes where possible. kind: the device, "cpu" or "cuda".
    """
    if micro_batch is None:
        micro_batch = min(_TOKENS_AT_ONCE[kind] // tokens, int(_FREE_SHARE * free_bytes // row_bytes))
    limit = max(1, min(micro_batch, batch // ranks))
    divisors = [rows for rows in range(limit, 0, -1) if batch % rows == 0]
    return next((rows for rows in divisors if batch // rows % ranks == 0), divisors[0])


def row_bytes(tokens: int, widths: int, outputs: int) -> float:
    """Return the approximate bytes of the activations of one row that its backward pass needs.

    Attention matrices are not counted, since fused kernels do not keep them. The sum counts the bf16 inputs and
    outputs of all linears (`widths`, the sum of their widths; for a GPT block 32 times its width, where Korthikanti et
    al. 2022, arXiv:2205.05198, eq. 2, count 34), and for the `outputs` logits a gradient and the teacher's logits too.
    """
    return tokens * (2.0 * widths + 6.0 * outputs)
