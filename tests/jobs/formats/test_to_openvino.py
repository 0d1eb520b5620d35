"""An export to OpenVINO computes the artifact's outputs, at once and token by token, and stock OpenVINO runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import formats, runtimes
from jobs.models import families
from jobs.models.families import Task

openvino = pytest.importorskip("openvino")

TOLERANCE = 2e-5
"""Absolute tolerance of logits, which spread by 0.2: both sides compute in fp32 on the same integers and scales."""
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}  # fmt: skip
"""Options that turn off OpenVINO's default rounding: of activations, to 8 bits, and of the KV cache."""
Steps = tuple[tuple[str, dict[str, object]], ...]
FOUR: Steps = (("rtn", {"bits": 4, "group": 32}),)
KINDS: dict[str, Steps] = {
    "as it is": (),
    "8 bits": (("rtn", {"bits": 8, "group": 0}),),
    "4 bits": FOUR,
    "4 bits, centred": (("rtn", {"bits": 4, "group": 32, "symmetric": True}),),
    "3 bits": (("rtn", {"bits": 3, "group": 32}),),
    "uneven groups": (("rtn", {"bits": 4, "group": 64}),),
    "real zeros": (("hqq", {"bits": 4, "group": 32}),),
    "scaled inputs": (("awq", {"bits": 4, "group": 32}),),
    "rounded activations": (("smoothquant", {}),),
    "packed embedding": (("rtn", {"bits": 4, "group": 32, "embedding_bits": 8}),),
    "mended rounding": (("rtn", {"bits": 3, "group": 32, "correction_rank": 4}),),
    "mixed": (("mixed", {"average_bits": 3.5}),),
    "low rank": (("svd_llm", {"keep": 0.7}),),
    "ranks of their own": (("svd_llm", {"keep": 0.7, "allocation": "global"}),),
    "fewer neurons": (("prune_ffn", {"ratio": 0.4, "correction": "bias"}),),
    "fewer heads": (("prune_heads", {"ratio": 0.5}),),
    "fewer blocks": (("drop_layers", {"count": 2}),),
    "sparse": (("wanda", {"sparsity": 0.5}),),
    "chain": (("drop_layers", {"count": 1}), ("prune_ffn", {"ratio": 0.4}), ("svd_llm", {"keep": 0.7}),
              ("rtn", {"bits": 4, "group": 32})),
}  # fmt: skip
TASKS = [(family, task) for family in families.names() for task in families.family(family).tasks]


def runner(folder: Path) -> Any:
    return runtimes.load("openvino").OpenVinoRunner(folder, 1, **EXACT)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_llama_computes_the_outputs_of_the_artifact(
    kind: str, artifact, expected, rows, tmp_path: Path
) -> None:
    folder = artifact("llama", KINDS[kind])
    formats.write("openvino", folder, tmp_path / "out")
    # Tiny differences decide which integer an activation is rounded to.
    tolerance = 0.02 if kind == "rounded activations" else TOLERANCE
    outputs = torch.from_numpy(runner(tmp_path / "out").answer(rows.numpy()))
    torch.testing.assert_close(outputs, expected(folder), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_every_family_computes_the_outputs_of_the_artifact_at_once_and_token_by_token(
    family: str, task: Task, artifact, expected, rows, tmp_path: Path
) -> None:
    folder = artifact(family, FOUR, task)
    formats.write("openvino", folder, tmp_path / "out")
    session, outputs = runner(tmp_path / "out"), expected(folder)
    rows = rows.numpy()
    torch.testing.assert_close(torch.from_numpy(session.answer(rows)), outputs, atol=TOLERANCE, rtol=0)
    if task != "causal-lm":
        with pytest.raises(ValueError, match="causal"):
            session.decode(rows[:1, :1])
        return
    steps = [session.prefill(rows[:1, :5])]
    steps += [session.decode(rows[:1, i : i + 1]) for i in range(5, rows.shape[1])]
    torch.testing.assert_close(
        torch.from_numpy(np.concatenate(steps, 1)), outputs[:1, 4:], atol=TOLERANCE, rtol=0
    )


STOCK = """
import json, sys
import numpy as np, openvino
request = openvino.Core().compile_model(sys.argv[1], "CPU", json.loads(sys.argv[3])).create_infer_request()
rows = np.array(json.loads(sys.argv[2]))
inputs = {"input_ids": rows, "attention_mask": np.ones_like(rows),
          "position_ids": np.arange(rows.shape[1])[None].repeat(len(rows), 0),
          "beam_idx": np.arange(len(rows), dtype=np.int32)}
assert not any(name in sys.modules for name in ("jobs", "orchestrator"))
print(json.dumps(request.infer(inputs)["logits"].tolist()))
"""


def test_stock_openvino_runs_it_without_our_code(artifact, expected, rows, tmp_path: Path) -> None:
    folder = artifact("llama", KINDS["chain"])
    formats.write("openvino", folder, tmp_path / "out")
    arguments = [str(tmp_path / "out" / "openvino_model.xml"), json.dumps(rows.tolist()), json.dumps(EXACT)]
    process = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    torch.testing.assert_close(
        torch.tensor(json.loads(process.stdout)), expected(folder), atol=TOLERANCE, rtol=0
    )


def test_exports_of_one_structure_share_a_graph(artifact, tmp_path: Path) -> None:
    for name, kind in (("four", "4 bits"), ("three", "3 bits"), ("narrow", "fewer neurons")):
        formats.write("openvino", artifact("llama", KINDS[kind]), tmp_path / name, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "graphs").glob("*.xml"))) == 2
    formats.write("openvino", artifact("llama", KINDS["4 bits"]), tmp_path / "without_cache")
    for file in ("openvino_model.xml", "openvino_model.bin"):
        assert (tmp_path / "without_cache" / file).read_bytes() == (tmp_path / "four" / file).read_bytes()


def test_a_missing_package_is_reported_with_the_command_to_install_it(
    artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"slimfront\[openvino\]"):
        formats.write("openvino", artifact("llama", ()), tmp_path / "out")
