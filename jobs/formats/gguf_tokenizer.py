"""Words: a tokenizer.json as llama.cpp has tokenizers: every token in the order of ids, and how text is first split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, as GGUF numbers them."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Mapping[str, str] = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
}
"""What text is split by before byte pairs are merged, and what llama.cpp calls that."""


@dataclass(frozen=True)
class GgufTokenizer:
    """kind: `gpt2` for byte pairs, `llama` for SentencePiece's. split: how llama.cpp calls what text is split by
    first. scores: SentencePiece merges the pair of the highest score first; byte pairs have none.
    space_first: whether text gets a space before it; None where that is not asked."""

    kind: str
    split: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    space_first: bool | None


def read_tokenizer(folder: Path, rows: int) -> GgufTokenizer:
    """The tokenizer of a model folder whose embedding has so many rows; those without a token are unused.

    Raises ValueError where llama.cpp has none like it.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json to write into a GGUF file")
    found: dict[str, Any] = json.loads(file.read_text())
    model = found["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"{file}: a tokenizer of type {model['type']} has no place in a GGUF file of a decoder"
        )
    added = {token["id"]: token for token in found["added_tokens"]}
    text = {place: token for token, place in model["vocab"].items()}
    text |= {place: token["content"] for place, token in added.items()}
    if text and max(text) >= rows:
        raise ValueError(f"{file} makes ids up to {max(text)}, and the embedding has {rows} rows")
    tokens = [text.get(place, f"[PAD{place}]") for place in range(rows)]
    pieces = bool(model.get("byte_fallback"))
    types = [_type(place, text, added, model.get("unk_token"), pieces) for place in range(rows)]
    if not pieces:
        return GgufTokenizer("gpt2", _split(file, found["pre_tokenizer"]), tokens, types, [], None)
    # Its merges were learned in the order of ids, so the lower id has the higher score.
    scores = [-float(place) for place in range(rows)]
    return GgufTokenizer("llama", "default", tokens, types, scores, _space_first(found))


def _type(
    place: int,
    text: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    unknown: str | None,
    pieces: bool,
) -> int:
    if place not in text:
        return UNUSED
    if pieces and text[place] == unknown:
        return UNKNOWN
    if place in added:
        return CONTROL if added[place]["special"] else USER_DEFINED
    byte = pieces and len(text[place]) == 6 and text[place].startswith("<0x") and text[place].endswith(">")
    return BYTE if byte else NORMAL


def _split(file: Path, given: Mapping[str, Any] | None) -> str:
    parts = [] if given is None else given.get("pretokenizers", [given])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        known = _SPLITS.get(parts[0]["pattern"].get("Regex", ""))
        if known is not None:
            return known
    raise ValueError(
        f"{file} splits text in a way ({', '.join(kinds) or 'none'}) that is none of those known to be "
        f"llama.cpp's: gpt-2, smollm, {', '.join(_SPLITS.values())}"
    )


def _space_first(found: Mapping[str, Any]) -> bool:
    normalizer, splitter = found.get("normalizer") or {}, found.get("pre_tokenizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )
