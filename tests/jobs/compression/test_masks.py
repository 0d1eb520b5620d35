"""Masks: sparse models become dense for training and sparse again, with the same zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import techniques
from jobs.calibration.statistics import Statistics
from jobs.compression import masks
from jobs.context import Context
from jobs.models import loading
from jobs.models.layers import SparseLinear
from jobs.models.model import Model
from jobs.techniques.magnitude import Magnitude
from jobs.training import loop, settings


@pytest.mark.parametrize("name", ["distill", "finetune"])
def test_retraining_a_sparse_model_keeps_its_zeros(
    sparse: Model, name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    initial_values = {key: layer.get_buffer("values").clone() for key, layer in sparse.linears().items()}
    initial_zeros, layout = zero_masks(sparse), sparse.layout()
    rows = torch.randint(3, 512, (4, 16), generator=torch.Generator().manual_seed(2))
    context = Context(
        Statistics(None, "key"), tmp_path, 0, training=rows, teacher=lambda: loading.load(tiny_llama)
    )
    options: dict[str, str | float] = {"steps": 3, "learning_rate": 1e-3}
    if name == "finetune":
        options["method"] = "full"
    step = techniques.load(name).of(options)
    trained = step.compress(sparse, context)
    assert trained.layout() == layout == step.output_layout(layout)
    assert all(torch.equal(initial_zeros[key], mask) for key, mask in zero_masks(trained).items())
    assert any(
        not torch.equal(initial_values[key], layer.get_buffer("values"))
        for key, layer in trained.linears().items()
    )


def test_training_that_would_fill_the_zeros_is_refused(sparse: Model) -> None:
    with pytest.raises(ValueError, match=r"finetune\.method=lora would make"):
        techniques.load("finetune").of({"method": "lora"}).output_layout(sparse.layout())


@pytest.fixture
def sparse(tiny_llama: Path, tmp_path: Path) -> Model:
    context = Context(Statistics(None, "key"), tmp_path, 0)
    return Magnitude(sparsity=0.6).compress(loading.load(tiny_llama), context)


TOKENS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))


def zero_masks(model: Model) -> dict[str, Tensor]:
    masks_by_name = {}
    for name, layer in model.linears().items():
        assert isinstance(layer, SparseLinear)
        masks_by_name[name] = ~layer.kept()
    return masks_by_name


def update(model: Model, optimizer: torch.optim.Optimizer) -> float:
    loss = model.module(TOKENS, labels=TOKENS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_densify_and_sparsify_restore_the_same_model(sparse: Model) -> None:
    layout, state = sparse.layout(), sparse.module.state_dict()
    with torch.no_grad():
        expected_logits = sparse.module(TOKENS).logits
    kept_masks = masks.densify(sparse)
    assert sparse.layout().forms() == {"dense"}
    assert set(kept_masks) == set(sparse.linears())
    with torch.no_grad():
        assert torch.equal(sparse.module(TOKENS).logits, expected_logits)
    masks.sparsify(sparse, kept_masks)
    assert sparse.layout() == layout
    assert all(torch.equal(state[name], tensor) for name, tensor in sparse.module.state_dict().items())


def test_densify_ignores_dense_linears(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    layers = model.linears()
    assert masks.densify(model) == {}
    assert all(model.linears()[name] is layer for name, layer in layers.items())


def test_with_held_masks_zeros_stay_zero_and_other_weights_learn(sparse: Model) -> None:
    layout, initial_zeros = sparse.layout(), zero_masks(sparse)
    values = {name: layer.values.clone() for name, layer in sparse.linears().items()}
    kept_masks = masks.densify(sparse)
    sparse.blocks.requires_grad_(True)
    masks.hold(sparse, kept_masks)
    trained = [parameter for parameter in sparse.module.parameters() if parameter.requires_grad]
    assert sum(parameter.ndim == 2 for parameter in trained) == len(kept_masks)
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.1)
    losses = [update(sparse, optimizer) for _ in range(4)]
    weights = [parameter for parameter in trained if parameter.ndim == 2]
    assert not any(
        bool(parameter[~mask].any()) for parameter, mask in zip(weights, kept_masks.values(), strict=True)
    )
    masks.sparsify(sparse, kept_masks)
    final_zeros = zero_masks(sparse)
    assert all(torch.equal(initial_zeros[name], final_zeros[name]) for name in initial_zeros)
    assert sparse.layout() == layout
    assert losses[-1] < losses[0]
    assert all(not torch.equal(values[name], layer.values) for name, layer in sparse.linears().items())
    assert not any(
        parameter.requires_grad for name, parameter in sparse.module.named_parameters() if "proj" in name
    )


def test_a_kept_weight_that_becomes_zero_stays_in_the_mask(sparse: Model) -> None:
    layout = sparse.layout()
    kept_masks = masks.densify(sparse)
    for layer in sparse.linears().values():
        layer.get_parameter("weight").data.zero_()
    masks.sparsify(sparse, kept_masks)
    assert sparse.layout() == layout


@pytest.mark.parametrize("stage", [0, 2])
def test_held_masks_also_apply_to_fp32_master_weights(stage: int, sparse: Model) -> None:
    layout, initial_zeros = sparse.layout(), zero_masks(sparse)
    kept_masks = masks.densify(sparse)
    sparse.blocks.requires_grad_(True)
    masks.hold(sparse, kept_masks)
    log = loop.train(
        sparse.module,
        iter([TOKENS] * 6),
        lambda module, rows: module(rows, labels=rows).loss,
        settings.Training(1e-3, 6, zero_stage=stage),
        lambda share, activity: None,
    )
    masks.sparsify(sparse, kept_masks)
    final_zeros = zero_masks(sparse)
    assert all(torch.equal(initial_zeros[name], final_zeros[name]) for name in initial_zeros)
    assert sparse.layout() == layout
    assert log.losses[-1] < log.losses[0]
    with torch.no_grad():
        assert sparse.module(TOKENS, labels=TOKENS).loss.item() < log.losses[0]
