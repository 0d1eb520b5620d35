"""Which parts of a model are on its device, and when. Without a GPU, moves are recorded instead of executed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from jobs import techniques
from jobs.calibration.block_stream import stream
from jobs.calibration.statistics import Statistics
from jobs.context import Context
from jobs.models import loading, placement
from jobs.models.model import Model
from tests.conftest import Tiny, config_of, needs_cuda

LAYER_WISE = (
    "asvd", "awq", "drop_layers", "gptq", "hqq", "magnitude", "prune_ffn", "prune_heads", "prune_hidden",
    "rtn", "smoothquant", "sparsegpt", "svd", "svd_llm", "wanda",
)  # fmt: skip
SEQUENTIAL: dict[str, dict[str, Any]] = {
    "gptq": {"sequential": True, "correction_rank": 4}, "sparsegpt": {"sequential": True},
    "wanda": {"sequential": True}, "svd_llm": {"update": "sequential"},
}  # fmt: skip
GENTLE: dict[str, dict[str, Any]] = {"drop_layers": {"count": 1}, "prune_heads": {"ratio": 0.5}}
"""Options for techniques whose defaults change too much of so small a model, or nothing."""
TOKENS = torch.randint(3, 512, (6, 24), generator=torch.Generator().manual_seed(0))


@dataclass
class Device:
    """A simulated device: records the modules on it, and the peak bytes of their tensors."""

    parts: dict[int, nn.Module] = field(default_factory=dict)
    peak_bytes: int = 0

    def move(self, part: nn.Module, device: str) -> None:
        if device == "cpu":
            for module in part.modules():
                self.parts.pop(id(module), None)
        else:
            self.parts |= {id(module): module for module in part.modules()}
        self.peak_bytes = max(self.peak_bytes, self.used_bytes())

    def holds(self, part: nn.Module) -> bool:
        return all(id(module) in self.parts for module in part.modules())

    def used_bytes(self) -> int:
        tensors: dict[int, int] = {}
        for part in self.parts.values():
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                tensors[id(tensor)] = tensor.nbytes
        return sum(tensors.values())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    monkeypatch.setattr(placement, "_move", lambda part, where: device.move(part, where))
    monkeypatch.setattr(placement, "_is_on", lambda part, where: device.holds(part))
    return device


@contextmanager
def every_pass(look: Callable[[nn.Module], None]) -> Iterator[None]:
    hook = register_module_forward_pre_hook(lambda module, args: look(module))
    try:
        yield
    finally:
        hook.remove()


def load(folder: Path) -> Model:
    """Load a model to "cpu" that computes on "cpu:0", the same device by another name."""
    return loading.load(folder, "cpu:0")


@pytest.fixture(scope="module")
def of_depth(
    tmp_path_factory: pytest.TempPathFactory, words: transformers.PreTrainedTokenizerFast
) -> Callable[[int], Path]:
    """Return the folder of a random Llama with this number of blocks."""

    def folder_of(depth: int) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"llama-of-{depth}"
        if not folder.exists():
            torch.manual_seed(0)
            config = config_of("llama")
            config.num_hidden_layers = depth
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            words.save_pretrained(folder)
        return folder

    return folder_of


def bytes_of(*parts: nn.Module) -> int:
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))


def compressed(name: str, options: dict[str, Any], model: Model, workdir: Path) -> Model:
    context = Context(Statistics(workdir / "statistics", "parent"), workdir, 0, calibration=TOKENS)
    return techniques.load(name).of(options).compress(model, context)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in LAYER_WISE), *SEQUENTIAL.items()], ids=str
)
def test_memory_on_the_device_does_not_grow_with_depth(
    name: str, options: dict[str, Any], of_depth: Callable[[int], Path], recorded: Device, tmp_path: Path
) -> None:
    peaks = []
    options = GENTLE.get(name, options)
    for depth in (2, 8):
        model = load(of_depth(depth))
        block = bytes_of(model.blocks[0])
        around = bytes_of(model.base) - depth * block
        recorded.peak_bytes = 0
        compressed(name, options, model, tmp_path / str(depth))
        # A compressed block may be a little larger than the original: packed, with a low-rank correction.
        assert 0 < recorded.peak_bytes <= around + 1.5 * block
        assert not recorded.parts
        peaks.append(recorded.peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "distilbert"])
def test_all_modules_that_run_in_a_stream_are_on_the_device(name: str, tiny: Tiny, recorded: Device) -> None:
    model = load(tiny(name))
    off_device: list[str] = []

    def look(module: nn.Module) -> None:
        if next(module.parameters(recurse=False), None) is not None and not recorded.holds(module):
            off_device.append(type(module).__name__)

    with every_pass(look):
        for visit in stream(model, TOKENS, lambda share, task: None, "test"):
            assert recorded.parts.keys() == {id(part) for part in visit.block.modules()}
            visit.run()
    assert off_device == []
    assert not recorded.parts


def test_nested_contexts_move_a_part_back_only_once(tiny_llama: Path, recorded: Device) -> None:
    model = load(tiny_llama)
    inner = f"{model.blocks_name}.0.mlp.down_proj"
    with placement.on_device(model, ""):
        with placement.on_device(model, inner):
            pass
        with placement.stream_blocks_to_device(model):
            model.base(TOKENS)
        assert recorded.holds(model.module)
    assert not recorded.parts


def test_a_replaced_part_and_its_replacement_are_moved_back(tiny_llama: Path, recorded: Device) -> None:
    model = load(tiny_llama)
    name = f"{model.blocks_name}.0.mlp.down_proj"
    moved: list[nn.Module] = []
    with placement.on_device(model, name):
        original, replacement = model.module.get_submodule(name), nn.Linear(2, 2)
        model.replace(name, replacement)
        recorded.move = lambda part, where: moved.append(part)  # type: ignore[method-assign]
    assert moved == [original, replacement]


def test_an_interrupted_pass_leaves_nothing_on_the_device(tiny_llama: Path, recorded: Device) -> None:
    model = load(tiny_llama)

    def fail(module: nn.Module, args: object) -> None:
        raise RuntimeError("interrupted")

    model.blocks[1].register_forward_pre_hook(fail)
    model.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"), placement.stream_blocks_to_device(model):
        model.base(TOKENS)
    assert not recorded.parts


def test_on_the_cpu_nothing_is_moved(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(part: nn.Module, device: str) -> None:
        raise AssertionError("moved")

    monkeypatch.setattr(placement, "_move", refuse)
    compressed("gptq", {"sequential": True}, loading.load(tiny_llama), tmp_path)


@needs_cuda
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in LAYER_WISE), *SEQUENTIAL.items()], ids=str
)
def test_on_cuda_memory_does_not_grow_with_depth(
    name: str, options: dict[str, Any], of_depth: Callable[[int], Path], tmp_path: Path
) -> None:
    peaks = []
    options = GENTLE.get(name, options)
    for run, depth in enumerate((2, 2, 8)):  # in the first run the libraries allocate their workspaces
        model = loading.load(of_depth(depth), "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        initial = torch.cuda.memory_allocated()
        result = compressed(name, options, model, tmp_path / str(run))
        peaks.append(torch.cuda.max_memory_allocated() - initial)
        assert {tensor.device.type for tensor in result.module.state_dict().values()} == {"cpu"}
    assert peaks[2] <= 1.1 * peaks[1] + 2**16


@needs_cuda
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_on_cuda_gram_matrices_equal_those_of_the_cpu(name: str, tiny: Tiny) -> None:
    silent = lambda share, task: None  # noqa: E731
    on_cpu, on_gpu = (loading.load(tiny(name), device) for device in ("cpu", "cuda"))
    gpu_grams = Statistics(None, "gpu").grams(on_gpu, TOKENS, silent)
    cpu_grams = Statistics(None, "cpu").grams(on_cpu, TOKENS, silent)
    for linear in on_cpu.linears():
        gram = cpu_grams.gram(linear)
        torch.testing.assert_close(
            gpu_grams.gram(linear), gram, rtol=0.05, atol=0.05 * gram.abs().max().item()
        )


@needs_cuda
def test_on_cuda_products_of_bf16_are_summed_in_fp32() -> None:
    """TF32 units read bf16 whole, so that no product is rounded."""
    from jobs.calibration.statistics import _add_gram, _mirror

    x = torch.randn(2048, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(700, 700, device="cuda")
    _add_gram(total, x.cuda())
    _mirror(total)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(total.cpu().double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_a_teacher_is_moved_as_a_whole(tiny_llama: Path, recorded: Device) -> None:
    teacher = placement.move_all(load(tiny_llama))
    assert recorded.holds(teacher.module)


def test_tied_weights_stay_tied_when_their_owner_is_moved(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "tied")
    model = loading.load(tmp_path / "tied")
    with placement.on_device(model, *model.tables()):
        assert model.tied_head() is not None
    assert model.tied_head() is not None
