"""Families: where the parts of a transformer are, one small table of attribute paths per architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["causal-lm", "classification", "embedding"]
TASKS: tuple[Task, ...] = ("causal-lm", "classification", "embedding")
Norms = Literal["before", "around", "after"]
"""Where the norms stand: before what reads the residual stream; also after what writes to it; or in the
stream itself (the original Transformer's)."""


@dataclass(frozen=True)
class Attention:
    """Paths within a block. fused: where queries, keys and values are the rows of one linear, how they lie:
    `stacked` (all queries, all keys, all values) or `interleaved` (those of one head after the other)."""

    query: str
    key: str
    value: str
    out: str
    fused: Literal["stacked", "interleaved"] | None = None

    @property
    def module(self) -> str:
        """The module that the query's linear is a child of, which reshapes by heads."""
        return self.query.rpartition(".")[0]


@dataclass(frozen=True)
class FeedForward:
    """into: the linears from the hidden width into the intermediate neurons (a gate counts too); out: the
    linear from there back."""

    into: tuple[str, ...]
    out: str


@dataclass(frozen=True)
class Family:
    """Paths are relative to the base model (`blocks`, `tables`, `final_norm`) or to one block (the others).

    name: `model_type` in config.json. encoder: reads text in both directions and predicts no next token.
    reads: per norm before something, the linears that read what it gives. tables: the embeddings that are
    added up into the first hidden state. ffn_key: the config's key for the number of intermediate neurons.
    """

    name: str
    encoder: bool
    blocks: str
    attention: Attention
    feed_forwards: tuple[FeedForward, ...]
    norms: Norms
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    final_norm: str = ""
    ffn_key: str = "intermediate_size"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return ("embedding", "classification") if self.encoder else ("causal-lm", "classification")


def _separate(prefix: str, query: str, key: str, value: str, out: str) -> Attention:
    return Attention(f"{prefix}.{query}", f"{prefix}.{key}", f"{prefix}.{value}", f"{prefix}.{out}")


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = FeedForward(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_BERT = Attention(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
)


def _llama_like(name: str, norms: Norms = "before") -> Family:
    into = "pre_feedforward_layernorm" if norms == "around" else "post_attention_layernorm"
    return Family(
        name=name,
        encoder=False,
        blocks="layers",
        attention=_separate("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forwards=(_GATED,),
        norms=norms,
        reads={"input_layernorm": _QKV, into: _GATED.into},
        tables=("embed_tokens",),
        final_norm="norm",
    )


def _bert_like(name: str) -> Family:
    return Family(
        name=name,
        encoder=True,
        blocks="encoder.layer",
        attention=_BERT,
        feed_forwards=(FeedForward(("intermediate.dense",), "output.dense"),),
        norms="after",
    )


_FAMILIES = (
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma3_text", norms="around"),
    Family(
        name="phi",
        encoder=False,
        blocks="layers",
        attention=_separate("self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        feed_forwards=(FeedForward(("mlp.fc1",), "mlp.fc2"),),
        norms="before",
        reads={"input_layernorm": (*_QKV, "mlp.fc1")},
        tables=("embed_tokens",),
        final_norm="final_layernorm",
    ),
    Family(
        name="opt",
        encoder=False,
        blocks="decoder.layers",
        attention=_separate("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forwards=(FeedForward(("fc1",), "fc2"),),
        norms="before",
        reads={"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",)},
        tables=("decoder.embed_tokens", "decoder.embed_positions"),
        final_norm="decoder.final_layer_norm",
        ffn_key="ffn_dim",
    ),
    Family(
        name="gpt2",
        encoder=False,
        blocks="h",
        attention=Attention("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", fused="stacked"),
        feed_forwards=(FeedForward(("mlp.c_fc",), "mlp.c_proj"),),
        norms="before",
        reads={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
        tables=("wte", "wpe"),
        final_norm="ln_f",
        ffn_key="n_inner",
    ),
    Family(
        name="gpt_neo",
        encoder=False,
        blocks="h",
        attention=_separate("attn.attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forwards=(FeedForward(("mlp.c_fc",), "mlp.c_proj"),),
        norms="before",
        reads={
            "ln_1": tuple(f"attn.attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            "ln_2": ("mlp.c_fc",),
        },
        tables=("wte", "wpe"),
        final_norm="ln_f",
    ),
    Family(
        name="gptj",
        encoder=False,
        blocks="h",
        attention=_separate("attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forwards=(FeedForward(("mlp.fc_in",), "mlp.fc_out"),),
        norms="before",
        reads={"ln_1": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")},
        tables=("wte",),
        final_norm="ln_f",
        ffn_key="n_inner",
    ),
    Family(
        name="gpt_neox",
        encoder=False,
        blocks="layers",
        attention=Attention(
            "attention.query_key_value",
            "attention.query_key_value",
            "attention.query_key_value",
            "attention.dense",
            fused="interleaved",
        ),
        feed_forwards=(FeedForward(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),),
        norms="before",
        reads={
            "input_layernorm": ("attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
        tables=("embed_in",),
        final_norm="final_layer_norm",
    ),
    _bert_like("bert"),
    _bert_like("roberta"),
    Family(
        name="distilbert",
        encoder=True,
        blocks="transformer.layer",
        attention=_separate("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        feed_forwards=(FeedForward(("ffn.lin1",), "ffn.lin2"),),
        norms="after",
        ffn_key="hidden_dim",
    ),
    Family(
        name="mobilebert",
        encoder=True,
        blocks="encoder.layer",
        attention=_BERT,
        # Each block has several feed-forward networks in a row; how many stands in the config.
        feed_forwards=(
            *(FeedForward((f"ffn.{n}.intermediate.dense",), f"ffn.{n}.output.dense") for n in range(8)),
            FeedForward(("intermediate.dense",), "output.dense"),
        ),
        norms="after",
    ),
)


def names() -> list[str]:
    return [family.name for family in _FAMILIES]


def family(name: str) -> Family:
    """The family called `name`; LookupError says which there are."""
    for known in _FAMILIES:
        if known.name == name:
            return known
    raise LookupError(f"model_type {name!r} is not supported (there are: {', '.join(names())})")
