"""What others say of exported models: stock transformers in a process where none of our packages can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import size
from jobs import formats, techniques
from jobs.models import loading
from jobs.models.families import Task
from jobs.models.layers import PackedEmbedding, PackedLinear, SparseLinear

ROWS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))

Steps = tuple[tuple[str, dict[str, object]], ...]
Artifact = Callable[..., Path]
Asked = Callable[[Mapping[str, Mapping[str, object]]], dict[str, Tensor]]

STOCK = """
import json, sys
class Ours:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "orchestrator", "cluster", "tests", "benchmarks"):
            raise ImportError(f"{name} is ours")
sys.meta_path.insert(0, Ours())
import torch, transformers
from safetensors.torch import save_file
asked = json.load(open(sys.argv[1]))
rows = torch.tensor(asked["rows"])
said = {}
for name, given in asked["models"].items():
    more = {}
    if given.get("gguf"):
        more = {"gguf_file": given["gguf"], "quantization_config": transformers.GgufConfig(dequantize=True)}
    if given.get("dequantize"):
        more = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    kind = getattr(transformers, given["class"])
    model, told = kind.from_pretrained(given["folder"], dtype=torch.float32, output_loading_info=True, **more)
    assert not any(told.get(what) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, told)
    with torch.no_grad():
        output = model.eval()(rows)
    said[name] = (output.logits if hasattr(output, "logits") else output.last_hidden_state).contiguous()
save_file(said, sys.argv[2])
"""


@pytest.fixture(scope="session")
def artifact(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The artifact of some steps on a tiny model of a family, and task if not its first; they must be possible."""

    def made(family: str, steps: Steps, task: Task | None = None) -> Path:
        folder = tmp_path_factory.mktemp("artifact") / "made"
        chosen = [techniques.load(name).of(options) for name, options in steps]
        found = size.compress(tiny(family, task), chosen, folder)
        assert found is not None, f"{steps} is not possible on a {family}"
        return found

    return made


@pytest.fixture(scope="session")
def rows() -> Tensor:
    """The texts that all are asked about."""
    return ROWS


@pytest.fixture(scope="session")
def expected() -> Callable[..., Tensor]:
    """What our own code says of an artifact's weights to ROWS, or other texts, computed in fp32."""

    def answers(artifact: Path, rows: Tensor = ROWS) -> Tensor:
        model = loading.load(artifact)
        for name, layer in (*model.linears().items(), *model.tables().items()):
            if isinstance(layer, PackedEmbedding):
                model.replace_embedding(layer.dense(torch.float32))
            elif isinstance(layer, (PackedLinear, SparseLinear)):
                model.replace(name, layer.dense(torch.float32))
        model.module.float()
        with torch.no_grad():
            return model.answer(rows)

    return answers


@pytest.fixture(scope="session")
def asked_of_stock(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """What stock transformers answers to ROWS, by name: each model's `folder`, `class` and how to load it."""

    def ask(asked: Mapping[str, Mapping[str, object]]) -> dict[str, Tensor]:
        # One process for many models: it takes ten seconds to start.
        tmp_path = tmp_path_factory.mktemp("stock")
        questions, said = tmp_path / "asked.json", tmp_path / "said.safetensors"
        told = {name: {**given, "folder": str(given["folder"])} for name, given in asked.items()}
        questions.write_text(json.dumps({"rows": ROWS.tolist(), "models": told}))
        ran = subprocess.run(
            [sys.executable, "-c", STOCK, str(questions), str(said)],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        return load_file(said)

    return ask


@dataclass(frozen=True)
class Heard:
    """By name: artifacts, what was written of them, and what our own code and stock transformers say of these."""

    made: dict[str, Path]
    written: dict[str, Path]
    said: dict[str, Tensor]
    heard: dict[str, Tensor]


@pytest.fixture(scope="session")
def hear(
    expected: Callable[..., Tensor], asked_of_stock: Asked, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Heard]:
    """Writes artifacts in a format and asks of those that `how` tells how stock transformers is to load."""

    def all_of(format: str, made: dict[str, Path], how: Mapping[str, Mapping[str, object]]) -> Heard:
        written = {name: tmp_path_factory.mktemp("written") / "out" for name in made}
        for name, folder in written.items():
            formats.write(format, made[name], folder)
        said = {name: expected(folder) for name, folder in made.items()}
        asked = {name: {"folder": written[name], **given} for name, given in how.items()}
        return Heard(made, written, said, asked_of_stock(asked))

    return all_of
