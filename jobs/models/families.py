"""The supported model families: for each architecture, the attribute paths of the parts of a transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["causal-lm", "classification", "embedding"]
TASKS: tuple[Task, ...] = ("causal-lm", "classification", "embedding")
Norms = Literal["before", "around", "after"]
"""Position of the norms: before the modules that read the residual stream (pre-norm), also after those that write to
it, or on the stream itself after each addition (post-norm, as in the original Transformer)."""


@dataclass(frozen=True)
class Attention:
    """Paths of the attention's linears within a block."""

    query: str
    key: str
    value: str
    out: str
    fused: Literal["stacked", "interleaved"] | None = None
    """Order of the rows if one linear computes queries, keys and values: `stacked` (all queries, all keys, all values)
    or `interleaved` (query, key and value of one head after the other); None for three linears."""

    @property
    def module(self) -> str:
        """Return the path of the attention module, the parent of the query's linear, which splits heads."""
        return self.query.rpartition(".")[0]


@dataclass(frozen=True)
class FeedForward:
    """Paths of a feed-forward network's linears within a block."""

    into: tuple[str, ...]
    """The linears from the hidden width to the intermediate neurons, the gate included."""
    out: str
    """The linear from the intermediate neurons back."""


@dataclass(frozen=True)
class Family:
    """One architecture. Paths are relative to the base model (`blocks`, `tables`, `final_norm`) or to one block."""

    name: str
    """`model_type` in config.json."""
    encoder: bool
    """Whether it attends in both directions and does not predict next tokens."""
    blocks: str
    attention: Attention
    feed_forwards: tuple[FeedForward, ...]
    norms: Norms
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each norm of a block, the linears that read its output."""
    tables: tuple[str, ...] = ()
    """The embeddings whose sum is the first hidden state."""
    final_norm: str = ""
    ffn_key: str = "intermediate_size"
    """The config's key for the number of intermediate neurons."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Return the supported tasks, the default one first."""
        if self.encoder:
            return ("embedding", "classification")
        return ("causal-lm", "classification")


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
        # Each block has several feed-forward networks in a row; the config states their number.
        feed_forwards=(
            *(FeedForward((f"ffn.{n}.intermediate.dense",), f"ffn.{n}.output.dense") for n in range(8)),
            FeedForward(("intermediate.dense",), "output.dense"),
        ),
        norms="after",
    ),
)


def names() -> list[str]:
    """Return the names of all supported families."""
    return [family.name for family in _FAMILIES]


def family(name: str) -> Family:
    """Return the family of this name; raise LookupError, which lists the supported ones, if there is none."""
    for candidate in _FAMILIES:
        if candidate.name == name:
            return candidate
    raise LookupError(f"model_type {name!r} is not supported; supported are {', '.join(names())}")
