from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from jobs.models import loading, sources, tokenizers
from jobs.models.layout import LAYOUT_FILE


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_an_original_is_loaded_in_bf16_without_gradients(tiny_llama: Path) -> None:
    model = loading.load(tiny_llama)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not model.module.training


def test_tied_embeddings_are_written_once_and_tied_again(tiny_llama: Path, tmp_path: Path) -> None:
    loading.save(loading.load(tiny_llama), tmp_path / "model", {"text": "original"})
    again = loading.load(tmp_path / "model")
    assert "lm_head.weight" not in again.layout().tensors()
    assert again.module.lm_head.weight is again.module.model.embed_tokens.weight
    assert json.loads((tmp_path / "model" / LAYOUT_FILE).read_text())["text"] == "original"
    assert (
        tokenizers.load_tokenizer(again.folder)("print").input_ids
        == tokenizers.load_tokenizer(tiny_llama)("print").input_ids
    )


def test_the_digest_changes_with_the_weights_and_not_with_the_folder(tiny_bert: Path, tmp_path: Path) -> None:
    copy = copied(tiny_bert, tmp_path / "copy")
    assert loading.digest(copy) == loading.digest(tiny_bert)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert loading.digest(copy) != loading.digest(tiny_bert)


def test_code_in_a_config_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    copy = copied(tiny_llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ValueError, match="auto_map"):
        sources.locate(str(copy))


def test_pickled_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    copy = copied(tiny_llama, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
        sources.locate(str(copy))


def test_an_unknown_family_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    copy = copied(tiny_llama, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="'mamba' is not supported"):
        sources.locate(str(copy))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "nowhere", "package:no_such_package"])
def test_a_missing_model_is_reported(source: str) -> None:
    with pytest.raises(FileNotFoundError):
        sources.locate(source)


def test_weights_that_do_not_match_their_layout_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    loading.save(loading.load(tiny_llama), tmp_path / "model", {})
    record = json.loads((tmp_path / "model" / LAYOUT_FILE).read_text())
    record["layout"]["others"]["model.norm.weight"]["shape"] = [63]
    (tmp_path / "model" / LAYOUT_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"does not match slimfront\.json.*model\.norm\.weight"):
        loading.load(tmp_path / "model")
