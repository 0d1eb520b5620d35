"""Families: where the parts of a transformer are, one small table of attribute paths per architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["causal-lm", "embedding"]


@dataclass(frozen=True)
class Family:
    """Paths are relative to the module (`blocks`) or to one block (the others).

    name: `model_type` in config.json.
    ffn_in: the linears from the hidden width into the intermediate neurons (a gate counts too).
    ffn_out: the linear from the intermediate neurons back.
    depth_key, ffn_key: the keys of config.json that hold the number of blocks and of intermediate neurons.
    """

    name: str
    tasks: tuple[Task, ...]
    blocks: str
    attention: tuple[str, ...]
    ffn_in: tuple[str, ...]
    ffn_out: str
    depth_key: str = "num_hidden_layers"
    ffn_key: str = "intermediate_size"

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block."""
        return (*self.attention, *self.ffn_in, self.ffn_out)


_FAMILIES = (
    Family(
        name="llama",
        tasks=("causal-lm",),
        blocks="model.layers",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ffn_in=("mlp.gate_proj", "mlp.up_proj"),
        ffn_out="mlp.down_proj",
    ),
    Family(
        name="bert",
        tasks=("embedding",),
        blocks="encoder.layer",
        attention=(
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
        ffn_in=("intermediate.dense",),
        ffn_out="output.dense",
    ),
)


def names() -> list[str]:
    return [family.name for family in _FAMILIES]


def family(name: str) -> Family:
    """The family called `name`; LookupError says which there are."""
    for known in _FAMILIES:
        if known.name == name:
            return known
    raise LookupError(f"model_type {name!r} is not supported (there are: {', '.join(names())})")
