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
def test_recovery_trains_a_sparse_model_and_keeps_it_sparse(
    sparse: Model, name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    before = {key: layer.get_buffer("values").clone() for key, layer in sparse.linears().items()}
    gone, layout = zeros(sparse), sparse.layout()
    rows = torch.randint(3, 512, (4, 16), generator=torch.Generator().manual_seed(2))
    context = Context(
        Statistics(None, "key"), tmp_path, 0, training=rows, teacher=lambda: loading.load(tiny_llama)
    )
    options = {"method": "full"} if name == "finetune" else {}
    step = techniques.load(name).of({"steps": 3, "learning_rate": 1e-3, **options})
    trained = step.compress(sparse, context)
    assert trained.layout() == layout == step.output_layout(layout)
    assert all(torch.equal(gone[key], places) for key, places in zeros(trained).items())
    assert any(
        not torch.equal(before[key], layer.get_buffer("values")) for key, layer in trained.linears().items()
    )


def test_recoveries_that_would_fill_the_zeros_are_refused(sparse: Model) -> None:
    with pytest.raises(ValueError, match=r"finetune\.method=lora would make"):
        techniques.load("finetune").of({"method": "lora"}).output_layout(sparse.layout())


@pytest.fixture
def sparse(tiny_llama: Path, tmp_path: Path) -> Model:
    context = Context(Statistics(None, "key"), tmp_path, 0)
    return Magnitude(sparsity=0.6).compress(loading.load(tiny_llama), context)


TOKENS = torch.randint(3, 512, (2, 16), generator=torch.Generator().manual_seed(1))


def zeros(model: Model) -> dict[str, Tensor]:
    found = {}
    for name, layer in model.linears().items():
        assert isinstance(layer, SparseLinear)
        found[name] = ~layer.kept()
    return found


def update(model: Model, optimizer: torch.optim.Optimizer) -> float:
    loss = model.module(TOKENS, labels=TOKENS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_dense_and_sparse_again_is_the_same_model(sparse: Model) -> None:
    layout, state = sparse.layout(), sparse.module.state_dict()
    with torch.no_grad():
        before = sparse.module(TOKENS).logits
    kept = masks.densify(sparse)
    assert sparse.layout().forms() == {"dense"}
    assert set(kept) == set(sparse.linears())
    with torch.no_grad():
        assert torch.equal(sparse.module(TOKENS).logits, before)
    masks.sparsify(sparse, kept)
    assert sparse.layout() == layout
    assert all(torch.equal(state[name], tensor) for name, tensor in sparse.module.state_dict().items())


def test_linears_that_are_not_sparse_are_left_alone(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    layers = model.linears()
    assert masks.densify(model) == {}
    assert all(model.linears()[name] is layer for name, layer in layers.items())


def test_held_masks_let_no_update_reach_what_is_zero_and_the_rest_learn(sparse: Model) -> None:
    layout, before = sparse.layout(), zeros(sparse)
    values = {name: layer.values.clone() for name, layer in sparse.linears().items()}
    kept = masks.densify(sparse)
    sparse.blocks.requires_grad_(True)
    masks.hold(sparse, kept)
    trained = [parameter for parameter in sparse.module.parameters() if parameter.requires_grad]
    assert sum(one.ndim == 2 for one in trained) == len(kept)
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.1)
    losses = [update(sparse, optimizer) for _ in range(4)]
    raw = [one for one in trained if one.ndim == 2]
    assert not any(bool(one[~mask].any()) for one, mask in zip(raw, kept.values(), strict=True))
    masks.sparsify(sparse, kept)
    after = zeros(sparse)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sparse.layout() == layout
    assert losses[-1] < losses[0]
    assert all(not torch.equal(values[name], layer.values) for name, layer in sparse.linears().items())
    assert not any(
        parameter.requires_grad for name, parameter in sparse.module.named_parameters() if "proj" in name
    )


def test_a_weight_that_training_made_zero_stays_among_the_kept(sparse: Model) -> None:
    layout = sparse.layout()
    kept = masks.densify(sparse)
    for layer in sparse.linears().values():
        layer.get_parameter("weight").data.zero_()
    masks.sparsify(sparse, kept)
    assert sparse.layout() == layout


@pytest.mark.parametrize("stage", [0, 2])
def test_held_masks_outlive_the_engines_masters_in_fp32(stage: int, sparse: Model) -> None:
    layout, before = sparse.layout(), zeros(sparse)
    kept = masks.densify(sparse)
    sparse.blocks.requires_grad_(True)
    masks.hold(sparse, kept)
    log = loop.train(
        sparse.module,
        iter([TOKENS] * 6),
        lambda module, rows: module(rows, labels=rows).loss,
        settings.Training(1e-3, 6, zero_stage=stage),
        lambda share, what: None,
    )
    masks.sparsify(sparse, kept)
    after = zeros(sparse)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sparse.layout() == layout
    assert log.losses[-1] < log.losses[0]
    with torch.no_grad():
        assert sparse.module(TOKENS, labels=TOKENS).loss.item() < log.losses[0]
