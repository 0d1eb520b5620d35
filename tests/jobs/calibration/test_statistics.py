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
from jobs.progress import Report
from jobs.techniques.drop_layers import keep_blocks
from jobs.techniques.svd_llm import SvdLlm

SILENT: Report = lambda share, what: None  # noqa: E731


def tokens() -> Tensor:
    return torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


def inputs_of(model: Model, linear: str) -> Tensor:
    seen: list[Tensor] = []
    layer = model.module.get_submodule(linear)
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    model.module(tokens())
    hook.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_linear_has_the_gram_matrix_of_what_it_reads(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = loading.load(request.getfixturevalue(f"tiny_{family}"))
    grams = Statistics(None, "key").grams(model, tokens(), SILENT)
    for linear in model.linears():
        x = inputs_of(model, linear)
        gram = (x.T @ x / len(x)).float()
        assert torch.allclose(grams.gram(linear), gram, atol=1e-4 * gram.abs().max().item())
        assert torch.allclose(grams.mean(linear), x.mean(dim=0).float(), atol=1e-4)
        assert torch.equal(grams.peak(linear), x.abs().amax(dim=0).float())


def test_linears_that_read_the_same_share_one_matrix(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    grams = Statistics(None, "key").grams(model, tokens(), SILENT)
    block = [names for owner, names in grams.sharing.items() if owner.startswith("model.layers.0.")]
    assert [[name.rpartition(".")[2] for name in names] for names in block] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    with pytest.raises(LookupError, match="nonsense"):
        grams.gram("nonsense")


def test_factored_linears_have_statistics_too(tiny_llama: Path, tmp_path: Path) -> None:
    context = Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens())
    model = SvdLlm(keep=0.5).compress(loading.load(tiny_llama), context)
    grams = Statistics(None, "other").grams(model, tokens(), SILENT)
    name = "model.layers.1.self_attn.k_proj.u"
    x = inputs_of(model, name)
    assert torch.allclose(grams.gram(name), (x.T @ x / len(x)).float(), rtol=1e-2, atol=1e-3)


def test_the_influence_of_a_block_is_how_far_it_turns_the_hidden_state(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    model.blocks[1].self_attn.o_proj.weight.zero_()
    model.blocks[1].mlp.down_proj.weight.zero_()
    influence = Statistics(None, "key").block_influence(model, tokens(), SILENT)
    states = model.module(tokens(), output_hidden_states=True).hidden_states
    cosine = nn.functional.cosine_similarity(states[0].float(), states[1].float(), dim=-1).mean()
    assert influence[0].item() == pytest.approx(1 - cosine.item(), abs=1e-5)
    assert influence[1].item() == pytest.approx(0, abs=1e-5)
    assert influence.min() == influence[1]


def test_what_was_computed_once_is_read_from_its_file(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    first = Statistics(tmp_path, "key").grams(model, tokens(), SILENT)

    def refuse(share: float, what: str) -> None:
        raise AssertionError("computed again")

    again = Statistics(tmp_path, "key").grams(model, tokens(), refuse)
    assert again.sharing == {owner: list(names) for owner, names in first.sharing.items()}
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(again.gram(name), first.gram(name))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *(f"key-gram.{block}.safetensors" for block in range(4)), "key-gram.parts.safetensors"
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="computed again"):
        Statistics(tmp_path, "another").grams(model, tokens(), refuse)


def test_what_is_found_tells_how_long_it_would_have_taken_alone(tmp_path: Path) -> None:
    def slowly() -> Part:
        time.sleep(0.05)
        return {"numbers": torch.zeros(1)}, {}

    first = Statistics(tmp_path, "key")
    first.stored("one", slowly)
    assert first.saved_seconds == 0

    second = Statistics(tmp_path, "key")

    def further() -> Part:
        second.stored("one", slowly)
        return slowly()

    second.stored("two", further)
    assert second.saved_seconds >= 0.05
    third = Statistics(tmp_path, "key")
    third.stored("two", further)
    assert third.saved_seconds >= 0.1


def test_statistics_of_which_a_part_is_gone_are_computed_again(tiny_llama: Path, tmp_path: Path) -> None:
    model = loading.load(tiny_llama)
    name = "model.layers.0.mlp.down_proj"
    first = Statistics(tmp_path, "key").grams(model, tokens(), SILENT).gram(name)
    (tmp_path / "key-gram.0.safetensors").unlink()
    assert torch.equal(Statistics(tmp_path, "key").grams(model, tokens(), SILENT).gram(name), first)


def test_memory_for_gram_matrices_does_not_grow_with_depth(tiny_llama: Path, tmp_path: Path) -> None:
    def peak_bytes(depth: int) -> int:
        model = loading.load(tiny_llama)
        keep_blocks(model, list(range(depth)))
        seen = []

        def look(share: float, what: str) -> None:
            held = (one for one in gc.get_objects() if type(one) is Tensor)
            seen.append(sum(one.nbytes for one in held if one.dtype == torch.float32))

        Statistics(tmp_path, f"depth-{depth}").grams(model, tokens(), look)
        return max(seen)

    assert peak_bytes(4) < 1.1 * peak_bytes(2)


def test_the_files_used_longest_ago_make_room(tmp_path: Path) -> None:
    def some() -> tuple[dict[str, Tensor], dict[str, str]]:
        return {"x": torch.zeros(1000)}, {}

    for place, key in enumerate(("old", "older")):
        Statistics(tmp_path, key).stored("kind", some)
        for part in ("0", "parts"):
            os.utime(tmp_path / f"{key}-kind.{part}.safetensors", (1000 - place, 1000 - place))
    kept = Statistics(tmp_path, "new", limit_bytes=9000).stored("kind", some)
    assert {file.name for file in tmp_path.glob("*.0.*")} == {
        "old-kind.0.safetensors", "new-kind.0.safetensors"
    }  # fmt: skip
    assert list(kept) == ["x"]
    assert kept["x"].shape == (1000,)
    tight = Statistics(tmp_path, "newest", limit_bytes=1).stored("kind", some)
    assert {file.name for file in tmp_path.iterdir()} == {
        "newest-kind.0.safetensors", "newest-kind.parts.safetensors"
    }  # fmt: skip
    assert len(tight) == 1
    assert kept["x"].sum() == 0  # open files outlive their eviction


def test_nan_is_refused_with_the_layer_that_reads_it(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    model.blocks[2].input_layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.q_proj gives NaN"):
        Statistics(None, "key").grams(model, tokens(), SILENT)
    with pytest.raises(ValueError, match=r"model\.layers\.2 gives NaN"):
        Statistics(None, "key").block_influence(model, tokens(), SILENT)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "gptq"])
def test_sequential_techniques_go_by_what_compressed_blocks_give(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """The slow way: block by block, on a model whose earlier blocks are compressed, with whole passes."""
    shared = Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens())
    step = techniques.load(name).of({"sequential": True})
    made = step.compress(loading.load(tiny_llama), shared)
    slow = loading.load(tiny_llama)
    for index in range(4):
        fresh = Context(Statistics(None, "key"), tmp_path, 0, calibration=tokens())
        plain = techniques.load(name).of({})
        # All of a copy that is compressed up to here, of which one block more is taken over.
        whole = _dense_copy(slow, tiny_llama)
        done = plain.compress(whole, fresh)
        for linear, layer in done.linears().items():
            if linear.startswith(f"model.layers.{index}."):
                slow.replace(linear, layer)
    expected, found = slow.linears(), made.linears()
    for linear, layer in found.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, expected[linear].state_dict()[key]), (linear, key)
    first = techniques.load(name).of({}).compress(loading.load(tiny_llama), shared)
    last = "model.layers.3.mlp.down_proj"
    differs = [
        not torch.equal(tensor, first.linears()[last].state_dict()[key])
        for key, tensor in found[last].state_dict().items()
    ]
    assert any(differs)


def _dense_copy(model: Model, folder: Path) -> Model:
    """The same model with every packed or sparse linear unpacked."""
    copy = loading.load(folder)
    for linear, layer in model.linears().items():
        if isinstance(layer, (PackedLinear, SparseLinear)):
            copy.replace(linear, layer.dense(DTYPE))
    return copy
