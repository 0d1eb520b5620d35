"""What ONNX Runtime says of an exported model is what its artifact says, whatever it was compressed by."""

from __future__ import annotations

import filecmp
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
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
"""Of outputs in fp32, where no products are rounded; logits spread by 0.2."""

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
    """An artifact in the format."""
    cache = tmp_path_factory.mktemp("cache")

    def made(folder: Path) -> Path:
        out = tmp_path_factory.mktemp("exported") / "out"
        formats.write("onnx", folder, out, cache)
        return out

    return made


def unrounded(folder: Path) -> Path:
    """The export with products that round nothing that they read."""
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
def test_it_says_what_the_artifact_says(
    kind: str, artifact: Artifact, exported: Exported, expected: Callable[..., Tensor], tiny_llama: Path
) -> None:
    made = artifact("llama", KINDS[kind])
    out = exported(made)
    assert formats.size_of(out, "onnx") == to_onnx.size_bytes(Layout.read(made), tiny_llama)
    torch.testing.assert_close(answer(unrounded(out)), expected(made), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_every_family_is_exported_for_each_of_its_tasks(
    family: str,
    task: Task,
    artifact: Artifact,
    exported: Exported,
    expected: Callable[..., Tensor],
    tiny: Tiny,
) -> None:
    made = artifact(family, KINDS["4 bits, zeros"], task)
    out = exported(made)
    assert formats.size_of(out, "onnx") == to_onnx.size_bytes(Layout.read(made), tiny(family, task))
    torch.testing.assert_close(answer(unrounded(out)), expected(made), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_decoding_token_by_token_says_what_the_whole_text_says(
    family: str, artifact: Artifact, exported: Exported, expected: Callable[..., Tensor]
) -> None:
    made = artifact(family, KINDS["packed embedding"])
    runner = runtimes.load("onnxruntime").start(unrounded(exported(made)), 1)
    rows = ROWS[:1].numpy()
    found = [runner.prefill(rows[:, :9])]
    found += [runner.decode(rows[:, at : at + 1]) for at in range(9, 16)]
    whole = expected(made, ROWS[:1])
    torch.testing.assert_close(
        torch.from_numpy(np.concatenate(found, 1)), whole[:, 8:], rtol=0, atol=TOLERANCE
    )


def test_as_shipped_products_round_what_they_read_to_eight_bits(
    artifact: Artifact, exported: Exported, expected: Callable[..., Tensor]
) -> None:
    made = artifact("llama", KINDS["4 bits"])
    off = (answer(exported(made)) - expected(made)).std() / expected(made).std()
    assert 0.001 < off < 0.03


def test_a_prefill_forgets_what_came_before(artifact: Artifact, exported: Exported) -> None:
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
def test_no_weights_hide_in_the_graph(family: str, kind: str, artifact: Artifact, exported: Exported) -> None:
    import onnx

    out = exported(artifact(family, KINDS[kind]))
    network = onnx.load(out / to_onnx.GRAPH, load_external_data=False).graph
    assert all(one.data_location == onnx.TensorProto.EXTERNAL for one in network.initializer)
    constants = [node.attribute[0] for node in network.node if node.op_type == "Constant"]
    assert max(one.ByteSize() for one in constants) < 1100
    places = {
        (int(where["offset"]), int(where["length"]))
        for one in network.initializer
        for where in [{entry.key: entry.value for entry in one.external_data}]
    }
    end = 0
    for offset, length in sorted(places):
        assert end <= offset < end + 64  # nothing between two tensors but what aligns the second
        end = offset + length


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "chain"), ("gpt_neo", "real zeros"), ("bert", "8 bits")]
)
def test_two_writes_are_the_same_to_the_byte(
    family: str, kind: str, artifact: Artifact, tmp_path: Path
) -> None:
    made = artifact(family, KINDS[kind])
    for out, cache in (("one", None), ("two", tmp_path), ("three", tmp_path)):
        formats.write("onnx", made, tmp_path / out, cache)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    for other in ("two", "three"):
        same, _, _ = filecmp.cmpfiles(tmp_path / "one", tmp_path / other, files, shallow=False)
        assert sorted(same) == files


STOCK = """
import json, sys
class Ours:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "orchestrator", "cluster", "tests", "torch", "transformers"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Ours())
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
rows = numpy.array(json.loads(sys.argv[2]))
given = {"input_ids": rows, "attention_mask": numpy.ones_like(rows)}
given["position_ids"] = numpy.arange(rows.shape[1])[None].repeat(len(rows), axis=0)
for one in session.get_inputs():
    if one.name.startswith("past_key_values."):
        given[one.name] = numpy.zeros((len(rows), one.shape[1], 0, one.shape[3]), numpy.float32)
assert given.keys() == {one.name for one in session.get_inputs()}
said = dict(zip([one.name for one in session.get_outputs()], session.run(None, given)))
assert said["present.3.value"].shape == (2, 2, 16, 16)
numpy.save(sys.argv[3], said["logits"])
"""


def test_onnx_runtime_alone_runs_it(artifact: Artifact, exported: Exported, tmp_path: Path) -> None:
    out = exported(artifact("llama", KINDS["packed embedding"]))
    said = tmp_path / "said.npy"
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, str(out), json.dumps(ROWS.tolist()), str(said)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    import numpy as np

    torch.testing.assert_close(torch.from_numpy(np.load(said)), answer(out), rtol=0, atol=1e-6)


def test_what_must_be_installed_is_said(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, found = artifact("llama", ()), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else found(name, *more)
    )
    with pytest.raises(ModuleNotFoundError, match=r"onnxruntime.*pip install 'slimfront\[onnx\]'"):
        formats.write("onnx", made, tmp_path / "out")
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
def test_a_row_is_cut_into_the_blocks_that_take_the_fewest_bytes(
    width: int, group: int, bits: int, size: int, number: int
) -> None:
    spec = LinearSpec(8, width, False, Packing(bits, group, symmetric=True))
    assert onnx_blocks.blocks_of(spec) == onnx_blocks.Blocks(bits, size, number)


def test_groups_that_blocks_cannot_follow_are_refused(tiny_llama: Path) -> None:
    layout = loading.original_layout(tiny_llama)
    assert to_onnx.refusal(layout) is None
    assert "multiples of 16" in str(to_onnx.refusal(layout.packed(Packing(4, 24, symmetric=True))))
