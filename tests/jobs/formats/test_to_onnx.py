"""ONNX Runtime computes the outputs of the artifact from its export, for every kind of compression."""

from __future__ import annotations

import filecmp
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs import formats, runtimes
from jobs.formats import onnx_blocks, to_onnx
from jobs.models import families, loading
from jobs.models.families import Task
from jobs.models.layout import Layout, LinearSpec, Packing

pytestmark = pytest.mark.skipif(to_onnx.missing() is not None, reason=str(to_onnx.missing()))

ROWS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5
"""Absolute tolerance of outputs in fp32 without rounded products; logits spread by 0.2."""

Steps = tuple[tuple[str, dict[str, object]], ...]
Tiny = Callable[..., Path]
Artifact = Callable[..., Path]
Exported = Callable[[Path], Path]

KINDS: dict[str, Steps] = {
    "as it is": (),
    "8 bits": (("rtn", {"bits": 8, "group": 0, "symmetric": True}),),
    "8 bits, zeros": (("rtn", {"bits": 8, "group": 32}),),
    "4 bits": (("rtn", {"bits": 4, "group": 64, "symmetric": True}),),
    "4 bits, zeros": (("gptq", {"bits": 4, "group": 32}),),
    "3 bits": (("rtn", {"bits": 3, "group": 32, "symmetric": True}),),
    "3 bits, zeros": (("rtn", {"bits": 3, "group": 32}),),
    "2 bits, zeros": (("rtn", {"bits": 2, "group": 32}),),
    "uneven groups": (("rtn", {"bits": 4, "group": 128}),),
    "real zeros": (("hqq", {"bits": 4, "group": 32}),),
    "scaled inputs": (("awq", {"bits": 4, "group": 32}),),
    "rounded activations": (("smoothquant", {}),),
    "packed embedding": (("rtn", {"bits": 4, "group": 32, "symmetric": True, "embedding_bits": 8}),),
    "packed embedding, zeros": (("rtn", {"bits": 3, "group": 32, "embedding_bits": 4}),),
    "mended rounding": (("rtn", {"bits": 4, "group": 32, "correction_rank": 4}),),
    "low rank": (("svd", {"keep": 0.5}),),
    "fewer neurons": (("prune_ffn", {"ratio": 0.4}),),
    "fewer blocks": (("drop_layers", {"count": 2}),),
    "sparse": (("magnitude", {"sparsity": 0.5}),),
    "narrower, all packed": (
        ("prune_hidden", {"ratio": 0.4}),
        ("rtn", {"bits": 4, "group": 64, "embedding_bits": 4}),
    ),
    "chain": (
        ("drop_layers", {"count": 1}),
        ("prune_ffn", {"ratio": 0.4}),
        ("svd", {"keep": 0.5}),
        ("rtn", {"bits": 4, "group": 32, "symmetric": True}),
    ),
}
TASKS = [(family, task) for family in families.names() for task in families.family(family).tasks]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export an artifact."""
    cache = tmp_path_factory.mktemp("cache")

    def export(folder: Path) -> Path:
        out = tmp_path_factory.mktemp("exported") / "out"
        formats.write("onnx", folder, out, cache)
        return out

    return export


def unrounded(folder: Path) -> Path:
    """Modify an export so that its products do not round their inputs, and return it."""
    import onnx

    network = onnx.load(folder / to_onnx.GRAPH, load_external_data=False)
    for node in network.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    (folder / to_onnx.GRAPH).write_bytes(network.SerializeToString())
    return folder


def answer(folder: Path) -> Tensor:
    return torch.from_numpy(runtimes.load("onnxruntime").start(folder, 1).answer(ROWS.numpy()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_the_outputs_of_the_artifact(
    kind: str, artifact: Artifact, exported: Exported, expected: Callable[..., Tensor], tiny_llama: Path
) -> None:
    folder = artifact("llama", KINDS[kind])
    out = exported(folder)
    assert formats.size_of(out, "onnx") == to_onnx.size_bytes(Layout.read(folder), tiny_llama)
    torch.testing.assert_close(answer(unrounded(out)), expected(folder), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_every_family_is_exported_for_each_of_its_tasks(
    family: str,
    task: Task,
    artifact: Artifact,
    exported: Exported,
    expected: Callable[..., Tensor],
    tiny: Tiny,
) -> None:
    folder = artifact(family, KINDS["4 bits, zeros"], task)
    out = exported(folder)
    assert formats.size_of(out, "onnx") == to_onnx.size_bytes(Layout.read(folder), tiny(family, task))
    torch.testing.assert_close(answer(unrounded(out)), expected(folder), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_decoding_token_by_token_gives_the_outputs_of_the_whole_text(
    family: str, artifact: Artifact, exported: Exported, expected: Callable[..., Tensor]
) -> None:
    folder = artifact(family, KINDS["packed embedding"])
    runner = runtimes.load("onnxruntime").start(unrounded(exported(folder)), 1)
    rows = ROWS[:1].numpy()
    steps = [runner.prefill(rows[:, :9])]
    steps += [runner.decode(rows[:, i : i + 1]) for i in range(9, 16)]
    whole = expected(folder, ROWS[:1])
    torch.testing.assert_close(
        torch.from_numpy(np.concatenate(steps, 1)), whole[:, 8:], rtol=0, atol=TOLERANCE
    )


def test_products_of_an_export_round_their_inputs_to_eight_bits(
    artifact: Artifact, exported: Exported, expected: Callable[..., Tensor]
) -> None:
    folder = artifact("llama", KINDS["4 bits"])
    off = (answer(exported(folder)) - expected(folder)).std() / expected(folder).std()
    assert 0.001 < off < 0.03


def test_a_prefill_starts_a_new_sequence(artifact: Artifact, exported: Exported) -> None:
    runner = runtimes.load("onnxruntime").start(exported(artifact("llama", ())), 1)
    rows = ROWS.numpy()
    fresh = runner.prefill(rows[:1])
    runner.decode(rows[:1, :1])
    runner.answer(rows)
    with pytest.raises(ValueError, match="prefill"):
        runner.decode(rows[:1, :1])
    assert np.array_equal(runner.prefill(rows[:1]), fresh)


def test_an_encoder_runs_whole_texts_only(artifact: Artifact, exported: Exported) -> None:
    runner = runtimes.load("onnxruntime").start(exported(artifact("bert", ())), 1)
    assert runner.prefill(ROWS[:1].numpy()).shape == (1, 16, 64)
    with pytest.raises(ValueError, match="prefill"):
        runner.decode(ROWS[:1, :1].numpy())


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "packed embedding, zeros"), ("llama", "real zeros"), ("gptj", "8 bits")]
)
def test_the_graph_contains_no_weights(
    family: str, kind: str, artifact: Artifact, exported: Exported
) -> None:
    import onnx

    out = exported(artifact(family, KINDS[kind]))
    network = onnx.load(out / to_onnx.GRAPH, load_external_data=False).graph
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in network.initializer)
    constants = [node.attribute[0] for node in network.node if node.op_type == "Constant"]
    assert max(constant.ByteSize() for constant in constants) < 1100
    ranges = set()
    for tensor in network.initializer:
        location = {entry.key: entry.value for entry in tensor.external_data}
        ranges.add((int(location["offset"]), int(location["length"])))
    end = 0
    for offset, length in sorted(ranges):
        assert end <= offset < end + 64  # only the padding that aligns the next tensor
        end = offset + length


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "chain"), ("gpt_neo", "real zeros"), ("bert", "8 bits")]
)
def test_two_exports_are_identical_to_the_byte(
    family: str, kind: str, artifact: Artifact, tmp_path: Path
) -> None:
    folder = artifact(family, KINDS[kind])
    for out, cache in (("one", None), ("two", tmp_path), ("three", tmp_path)):
        formats.write("onnx", folder, tmp_path / out, cache)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    for copy in ("two", "three"):
        same, _, _ = filecmp.cmpfiles(tmp_path / "one", tmp_path / copy, files, shallow=False)
        assert sorted(same) == files


STOCK = """
import json, sys
class OnlyOnnxRuntime:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "orchestrator", "cluster", "tests", "torch", "transformers"):
            raise ImportError(f"{name} cannot be imported")
sys.meta_path.insert(0, OnlyOnnxRuntime())
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
rows = numpy.array(json.loads(sys.argv[2]))
inputs = {"input_ids": rows, "attention_mask": numpy.ones_like(rows)}
inputs["position_ids"] = numpy.arange(rows.shape[1])[None].repeat(len(rows), axis=0)
for value in session.get_inputs():
    if value.name.startswith("past_key_values."):
        inputs[value.name] = numpy.zeros((len(rows), value.shape[1], 0, value.shape[3]), numpy.float32)
assert inputs.keys() == {value.name for value in session.get_inputs()}
outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs)))
assert outputs["present.3.value"].shape == (2, 2, 16, 16)
numpy.save(sys.argv[3], outputs["logits"])
"""


def test_onnx_runtime_alone_runs_it(artifact: Artifact, exported: Exported, tmp_path: Path) -> None:
    out = exported(artifact("llama", KINDS["packed embedding"]))
    logits = tmp_path / "logits.npy"
    process = subprocess.run(
        [sys.executable, "-c", STOCK, str(out), json.dumps(ROWS.tolist()), str(logits)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    import numpy as np

    torch.testing.assert_close(torch.from_numpy(np.load(logits)), answer(out), rtol=0, atol=1e-6)


def test_missing_libraries_are_reported_with_the_command_to_install_them(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, find_spec = artifact("llama", ()), importlib.util.find_spec

    def without_onnxruntime(name: str, package: str | None = None) -> ModuleSpec | None:
        if name == "onnxruntime":
            return None
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_onnxruntime)
    with pytest.raises(ModuleNotFoundError, match=r"onnxruntime.*pip install 'slimfront\[onnx\]'"):
        formats.write("onnx", folder, tmp_path / "out")
    assert runtimes.load("onnxruntime").missing() is not None


@pytest.mark.parametrize(
    ("width", "group", "bits", "size", "number"),
    [
        (576, 64, 4, 64, 9),
        (576, 128, 4, 64, 9),  # 5 blocks of 128 would take 64 integers more
        (1536, 128, 4, 128, 12),
        (1536, 0, 8, 256, 6),
        (64, 128, 4, 64, 1),
        (40, 32, 4, 16, 3),
    ],
)
def test_a_row_is_divided_into_the_blocks_that_take_the_fewest_bytes(
    width: int, group: int, bits: int, size: int, number: int
) -> None:
    spec = LinearSpec(8, width, False, Packing(bits, group, symmetric=True))
    assert onnx_blocks.blocks_of(spec) == onnx_blocks.Blocks(bits, size, number)


def test_groups_that_blocks_cannot_follow_are_refused(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    assert to_onnx.refusal(layout) is None
    assert "multiples of 16" in str(to_onnx.refusal(layout.packed(Packing(4, 24, symmetric=True))))
