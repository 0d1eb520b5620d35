"""Convert a tokenizer.json to llama.cpp's description: tokens by id, their types, and the pre-tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types by GGUF's numbers."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS: Mapping[str, str] = {
    _LETTERS + r"\p{N}{1,3}" + _SPACES: "llama-bpe",
    _LETTERS + r"\p{N}" + _SPACES: "qwen2",
}
"""llama.cpp's names of the expressions that split text before byte pairs are merged."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in llama.cpp's terms."""

    kind: str
    """`gpt2` for byte-level BPE, `llama` for SentencePiece's BPE."""
    pre_tokenizer: str
    """llama.cpp's name of the expression that splits text first."""
    tokens: list[str]
    """Text of each token, by id."""
    types: list[int]
    """Type of each token, by id."""
    scores: list[float]
    """SentencePiece merges the pair of the highest score first; empty for byte-level BPE."""
    adds_space_prefix: bool | None
    """Whether a space is added before the text; None for byte-level BPE, where it is not stored."""


def read_tokenizer(folder: Path, rows: int) -> GgufTokenizer:
    """Return the tokenizer of a model folder whose embedding has this many rows; rows without a token are unused.

    Raises ValueError if llama.cpp has no such tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json to write into a GGUF file")
    tokenizer: dict[str, Any] = json.loads(file.read_text())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{file} is a tokenizer of type {model['type']}; GGUF files of decoders need BPE")
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    texts = {token_id: text for text, token_id in model["vocab"].items()}
    texts |= {token_id: token["content"] for token_id, token in added.items()}
    if texts and max(texts) >= rows:
        raise ValueError(f"{file} makes ids up to {max(texts)}, and the embedding has {rows} rows")
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)]
    sentencepiece = bool(model.get("byte_fallback"))
    unknown = None
    if sentencepiece:
        unknown = model.get("unk_token")
    types = [_token_type(token_id, texts, added, sentencepiece, unknown) for token_id in range(rows)]
    if not sentencepiece:
        pre_tokenizer = _pre_tokenizer(file, tokenizer["pre_tokenizer"])
        return GgufTokenizer("gpt2", pre_tokenizer, tokens, types, [], None)
    # Merges were learned in the order of ids, so a lower id has a higher score.
    scores = [-float(token_id) for token_id in range(rows)]
    return GgufTokenizer("llama", "default", tokens, types, scores, _adds_space_prefix(tokenizer))


def _token_type(
    token_id: int,
    texts: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    sentencepiece: bool,
    unknown: str | None,
) -> int:
    """Return the type of a token. unknown: the text of SentencePiece's unknown token."""
    if token_id not in texts:
        return UNUSED
    text = texts[token_id]
    if sentencepiece and text == unknown:
        return UNKNOWN
    if token_id in added:
        return CONTROL if added[token_id]["special"] else USER_DEFINED
    if sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL


def _pre_tokenizer(file: Path, stated: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre-tokenizer; raise ValueError if it has none."""
    steps: list[Mapping[str, Any]] = []
    if stated is not None:
        steps = stated.get("pretokenizers", [stated])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise ValueError(
        f"{file} splits text by {', '.join(kinds) or 'no pre-tokenizer'}, which is none of llama.cpp's supported here: "
        f"gpt-2, smollm, {', '.join(_PRE_TOKENIZERS.values())}"
    )


def _adds_space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
