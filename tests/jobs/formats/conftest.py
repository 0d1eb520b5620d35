"""Outputs of exported models in stock transformers, in a process that cannot import slimfront's packages."""

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
StockAnswers = Callable[[Mapping[str, Mapping[str, object]]], dict[str, Tensor]]

STOCK = """
import json, sys
class NoSlimfront:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "orchestrator", "cluster", "tests", "benchmarks"):
            raise ImportError(f"{name} belongs to slimfront")
sys.meta_path.insert(0, NoSlimfront())
import torch, transformers
from safetensors.torch import save_file
request = json.load(open(sys.argv[1]))
rows = torch.tensor(request["rows"])
answers = {}
for name, options in request["models"].items():
    more = {}
    if options.get("gguf"):
        more = {"gguf_file": options["gguf"], "quantization_config": transformers.GgufConfig(dequantize=True)}
    if options.get("dequantize"):
        more = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    kind = getattr(transformers, options["class"])
    model, info = kind.from_pretrained(options["folder"], dtype=torch.float32, output_loading_info=True, **more)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    with torch.no_grad():
        output = model.eval()(rows)
    answers[name] = (output.logits if hasattr(output, "logits") else output.last_hidden_state).contiguous()
save_file(answers, sys.argv[2])
"""


@pytest.fixture(scope="session")
def artifact(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Compress a tiny model of a family, by default for its first task, by steps that it supports."""

    def compressed(family: str, steps: Steps, task: Task | None = None) -> Path:
        folder = tmp_path_factory.mktemp("artifact") / "model"
        chosen = [techniques.load(name).of(options) for name, options in steps]
        result = size.compress(tiny(family, task), chosen, folder)
        assert result is not None, f"{steps} is not possible on a {family}"
        return result

    return compressed


@pytest.fixture(scope="session")
def rows() -> Tensor:
    """The texts that all models read."""
    return ROWS


@pytest.fixture(scope="session")
def expected() -> Callable[..., Tensor]:
    """Return slimfront's outputs for ROWS or other texts, computed in fp32 from an artifact's weights."""

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
def stock_answers(tmp_path_factory: pytest.TempPathFactory) -> StockAnswers:
    """Return the outputs of stock transformers for ROWS, by name, given each model's folder, class and options."""

    def ask(models: Mapping[str, Mapping[str, object]]) -> dict[str, Tensor]:
        # One process for many models: it takes ten seconds to start.
        tmp_path = tmp_path_factory.mktemp("stock")
        request, answers = tmp_path / "request.json", tmp_path / "answers.safetensors"
        options = {name: {**model, "folder": str(model["folder"])} for name, model in models.items()}
        request.write_text(json.dumps({"rows": ROWS.tolist(), "models": options}))
        process = subprocess.run(
            [sys.executable, "-c", STOCK, str(request), str(answers)],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        return load_file(answers)

    return ask


@dataclass(frozen=True)
class Answers:
    """Artifacts, their exports, and the outputs of slimfront and of stock transformers, by name."""

    artifacts: dict[str, Path]
    exports: dict[str, Path]
    ours: dict[str, Tensor]
    stock: dict[str, Tensor]


@pytest.fixture(scope="session")
def compared(
    expected: Callable[..., Tensor], stock_answers: StockAnswers, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Answers]:
    """Write artifacts in a format, and run those in `options`, which state how stock transformers loads them."""

    def compare(
        format: str, artifacts: dict[str, Path], options: Mapping[str, Mapping[str, object]]
    ) -> Answers:
        exports = {name: tmp_path_factory.mktemp("export") / "out" for name in artifacts}
        for name, folder in exports.items():
            formats.write(format, artifacts[name], folder)
        ours = {name: expected(folder) for name, folder in artifacts.items()}
        models = {name: {"folder": exports[name], **loading} for name, loading in options.items()}
        return Answers(artifacts, exports, ours, stock_answers(models))

    return compare
