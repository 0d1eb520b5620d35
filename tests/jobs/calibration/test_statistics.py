"""Calibration statistics equal slow reference computations, are stored once, and stay within their size limit."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs import techniques
from jobs.calibration.cache import Part
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading
from jobs.models.layers import PackedLinear, SparseLinear
from jobs.models.model import DTYPE, Model
from jobs.progress import Report, no_report
from jobs.techniques.drop_layers import keep_blocks
from jobs.techniques.svd_llm import SvdLlm

SILENT: Report = no_report


def tokens() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def record_inputs(model: Model, linear: str) -> Tensor:
    inputs: list[Tensor] = []
    layer = model.module.get_submodule(linear)
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    model.module(tokens())
    hook.remove()
    return torch.cat(inputs).double()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_linear_has_the_gram_matrix_of_its_inputs(family: str, request: pytest.FixtureRequest) -> None:
    model = loading.load(request.getfixturevalue(f"tiny_{family}"))
    grams = Statistics(None, "key").grams(model, tokens(), SILENT)
    for linear in model.linears():
        x = record_inputs(model, linear)
        gram = (x.T @ x / len(x)).float()
        assert torch.allclose(grams.gram(linear), gram, atol=1e-4 * gram.abs().max().item())
        assert torch.allclose(grams.mean(linear), x.mean(dim=0).float(), atol=1e-4)
        assert torch.equal(grams.peak(linear), x.abs().amax(dim=0).float())


def test_linears_with_the_same_input_share_one_matrix(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    grams = Statistics(None, "key").grams(model, tokens(), SILENT)
    groups = []
    for owner, names in grams.sharing.items():
        if owner.startswith("model.layers.0."):
            groups.append([name.rpartition(".")[2] for name in names])
    assert groups == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    with pytest.raises(LookupError, match="nonsense"):
        grams.gram("nonsense")


def test_factored_linears_have_statistics(tiny_llama: Path, tmp_path: Path) -> None:
    context = Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens())
    model = SvdLlm(keep=0.5).compress(loading.load(tiny_llama), context)
    grams = Statistics(None, "other").grams(model, tokens(), SILENT)
    name = "model.layers.1.self_attn.k_proj.u"
    x = record_inputs(model, name)
    assert torch.allclose(grams.gram(name), (x.T @ x / len(x)).float(), rtol=1e-2, atol=1e-3)


def test_the_influence_of_a_block_is_its_cosine_change_of_the_hidden_state(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    model.blocks[1].self_attn.o_proj.weight.zero_()
    model.blocks[1].mlp.down_proj.weight.zero_()
    influence = Statistics(None, "key").block_influence(model, tokens(), SILENT)
    states = model.module(tokens(), output_hidden_states=True).hidden_states
    cosine = nn.functional.cosine_similarity(states[0].float(), states[1].float(), dim=-1).mean()
    assert influence[0].item() == pytest.approx(1 - cosine.item(), abs=1e-5)
    assert influence[1].item() == pytest.approx(0, abs=1e-5)
    assert influence.min() == influence[1]


def test_stored_statistics_are_read_from_their_file(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    first = Statistics(tmp_path, "key").grams(model, tokens(), SILENT)

    def refuse(share: float, activity: str) -> None:
        raise AssertionError("computed again")

    reloaded = Statistics(tmp_path, "key").grams(model, tokens(), refuse)
    assert reloaded.sharing == {owner: list(names) for owner, names in first.sharing.items()}
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(reloaded.gram(name), first.gram(name))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *(f"key-gram.{block}.safetensors" for block in range(4)), "key-gram.parts.safetensors"
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="computed again"):
        Statistics(tmp_path, "another").grams(model, tokens(), refuse)


def test_cached_statistics_report_the_seconds_that_they_saved(tmp_path: Path) -> None:
    def compute_slowly() -> Part:
        time.sleep(0.05)
        return {"numbers": torch.zeros(1)}, {}

    first = Statistics(tmp_path, "key")
    first.stored("one", compute_slowly)
    assert first.saved_seconds == 0

    second = Statistics(tmp_path, "key")

    def compute_from_first() -> Part:
        second.stored("one", compute_slowly)
        return compute_slowly()

    second.stored("two", compute_from_first)
    assert second.saved_seconds >= 0.05
    third = Statistics(tmp_path, "key")
    third.stored("two", compute_from_first)
    assert third.saved_seconds >= 0.1


def test_statistics_with_a_missing_part_are_computed_again(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    name = "model.layers.0.mlp.down_proj"
    first = Statistics(tmp_path, "key").grams(model, tokens(), SILENT).gram(name)
    (tmp_path / "key-gram.0.safetensors").unlink()
    assert torch.equal(Statistics(tmp_path, "key").grams(model, tokens(), SILENT).gram(name), first)


def test_memory_for_gram_matrices_does_not_grow_with_depth(tiny_llama: Path, tmp_path: Path) -> None:
    def peak_bytes(depth: int) -> int:
        model = loading.load(tiny_llama)
        keep_blocks(model, list(range(depth)))
        bytes_by_report = []

        def measure_memory(share: float, activity: str) -> None:
            tensors = (item for item in gc.get_objects() if type(item) is Tensor)
            bytes_by_report.append(sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.float32))

        Statistics(tmp_path, f"depth-{depth}").grams(model, tokens(), measure_memory)
        return max(bytes_by_report)

    assert peak_bytes(4) < 1.1 * peak_bytes(2)


def test_the_least_recently_used_files_are_evicted(tmp_path: Path) -> None:
    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        return {"x": torch.zeros(1000)}, {}

    for age, key in enumerate(("old", "older")):
        Statistics(tmp_path, key).stored("kind", compute)
        for part in ("0", "parts"):
            os.utime(tmp_path / f"{key}-kind.{part}.safetensors", (1000 - age, 1000 - age))
    stored = Statistics(tmp_path, "new", limit_bytes=9000).stored("kind", compute)
    assert {file.name for file in tmp_path.glob("*.0.*")} == {
        "old-kind.0.safetensors", "new-kind.0.safetensors"
    }  # fmt: skip
    assert list(stored) == ["x"]
    assert stored["x"].shape == (1000,)
    stored_alone = Statistics(tmp_path, "newest", limit_bytes=1).stored("kind", compute)
    assert {file.name for file in tmp_path.iterdir()} == {
        "newest-kind.0.safetensors", "newest-kind.parts.safetensors"
    }  # fmt: skip
    assert len(stored_alone) == 1
    assert stored["x"].sum() == 0  # an open file stays readable after its eviction


def test_nan_is_refused_with_the_layer_name(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    model.blocks[2].input_layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.q_proj gives NaN"):
        Statistics(None, "key").grams(model, tokens(), SILENT)
    with pytest.raises(ValueError, match=r"model\.layers\.2 gives NaN"):
        Statistics(None, "key").block_influence(model, tokens(), SILENT)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gptq"])
def test_sequential_techniques_calibrate_on_the_outputs_of_compressed_blocks(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """The expected model is built block by block, with whole passes through the blocks compressed before."""
    shared = Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens())
    step = techniques.load(name).of({"sequential": True})
    model = step.compress(loading.load(tiny_llama), shared)
    expected_model = loading.load(tiny_llama)
    for index in range(4):
        fresh = Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens())
        plain = techniques.load(name).of({})
        # A copy that is compressed up to this block is compressed as a whole, and one more block is taken from it.
        unpacked = _dense_copy(expected_model, tiny_llama)
        compressed = plain.compress(unpacked, fresh)
        for linear, layer in compressed.linears().items():
            if linear.startswith(f"model.layers.{index}."):
                expected_model.replace(linear, layer)
    expected, actual = expected_model.linears(), model.linears()
    for linear, layer in actual.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, expected[linear].state_dict()[key]), (linear, key)
    one_pass_model = techniques.load(name).of({}).compress(loading.load(tiny_llama), shared)
    last_linear = "model.layers.3.mlp.down_proj"
    differs = [
        not torch.equal(tensor, one_pass_model.linears()[last_linear].state_dict()[key])
        for key, tensor in actual[last_linear].state_dict().items()
    ]
    assert any(differs)


def _dense_copy(model: Model, folder: Path) -> Model:
    """The same model with every packed or sparse linear unpacked."""
    copy = loading.load(folder)
    for linear, layer in model.linears().items():
        if isinstance(layer, (PackedLinear, SparseLinear)):
            copy.replace(linear, layer.dense(DTYPE))
    return copy
