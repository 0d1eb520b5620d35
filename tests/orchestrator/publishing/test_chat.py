"""Chat generates text with an exported model, token by token."""

from pathlib import Path

import pytest
import torch

from jobs import formats
from jobs.models import loading, tokenizers
from orchestrator.publishing.chat import Chat


@pytest.fixture
def export(tiny_llama: Path, tmp_path: Path) -> Path:
    loading.save(loading.load(tiny_llama), tmp_path / "artifact", {})
    formats.write("slimfront", tmp_path / "artifact", tmp_path / "out")
    return tmp_path / "out"


def test_zero_temperature_generates_the_most_probable_tokens(export: Path) -> None:
    reply = "".join(Chat(export, 1).reply("An expression", 6, temperature=0.0, seed=0))
    tokenizer, module = tokenizers.load_tokenizer(export), loading.load(export).module
    token_ids = list(tokenizer("An expression").input_ids)
    for _ in range(6):
        with torch.no_grad():
            token_ids.append(int(module(torch.tensor([token_ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(token_ids[-6:], skip_special_tokens=True)
    assert reply == expected[: len(reply)]
    assert len(reply) > 0


def test_sampled_text_depends_only_on_the_seed(export: Path) -> None:
    chat = Chat(export, 1)
    first, repeated, different = (
        "".join(chat.reply("An expression", 12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == repeated != different


def test_a_folder_that_is_no_export_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="no export"):
        Chat(tiny_llama, 1)
