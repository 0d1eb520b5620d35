"""The format `safetensors`: a folder that `from_pretrained` of transformers loads without slimfront.

For models that are not quantized and whose shapes the family's config can describe. Sparse linears are written dense,
zeros included: the file is as large as without pruning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from jobs.formats import stock
from jobs.models.layout import Layout, LinearSpec, safetensors_bytes

WEIGHTS = "*.safetensors"


def missing() -> str | None:
    return None


def refusal(layout: Layout) -> str | None:
    for name, spec in layout.matrices.items():
        if spec.packing is not None:
            return (
                f"quantizing left {spec.packing.bits}-bit integers in {name}, which a plain model cannot hold; "
                f"unpacked they would be as large as before"
            )
    return stock.refusal(layout)


def size_bytes(layout: Layout, original: Path) -> int:
    dense = stock.sparse_unpacked(layout)
    tensors = dense.tensors()
    if _is_transposed(layout):
        for name in dense.linears:
            tensor = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = dataclasses.replace(tensor, shape=tensor.shape[::-1])
    return safetensors_bytes(tensors)


def write(artifact: Path, out: Path, cache: Path | None) -> None:
    layout = Layout.read(artifact)

    def weight_of(name: str, spec: LinearSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = stock.dense_weight(spec, tensors)
        if _is_transposed(layout) and name in layout.linears:
            weight = weight.T.contiguous()
        return {"weight": weight}

    stock.write_folder(artifact, out, weight_of, {})


def _is_transposed(layout: Layout) -> bool:
    """Return whether linears are written as GPT-2's Conv1D, with a weight [in, out]."""
    return layout.family.name == "gpt2"
