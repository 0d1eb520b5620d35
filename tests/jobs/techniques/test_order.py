"""Orders of techniques in a recipe are accepted, or refused with a reason."""

from __future__ import annotations

import pytest

from jobs import techniques
from jobs.technique import check_order


def check_names(*names: str) -> None:
    check_order([techniques.load(name) for name in names])


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("drop_layers", "prune_ffn", "svd_llm", "gptq"),
        ("svd_llm", "drop_layers", "rtn"),
        ("gptq", "drop_layers"),
        ("drop_layers", "drop_layers"),
        ("qat",),
        ("gradual_prune",),
        ("anneal_rank", "distill", "qat"),
    ],
)
def test_valid_orders_are_accepted(names: tuple[str, ...]) -> None:
    check_names(*names)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("gptq", "prune_ffn"), "prune_ffn cannot follow gptq: it accepts dense linears"),
        (("rtn", "gptq"), "gptq cannot follow rtn"),
        (("svd_llm", "prune_ffn"), "put prune_ffn before svd_llm"),
        (("svd_llm", "svd_llm"), "svd_llm produces factored linears"),
        (("distill", "qat"), "distill cannot come first"),
        (("qat", "distill"), "put distill before qat"),
    ],
)
def test_invalid_orders_are_refused_with_the_reason(names: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_names(*names)


def test_an_unknown_technique_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(LookupError, match="did you mean gptq"):
        techniques.load("gtpq")
