"""Real small things to test with: a tiny Llama and a tiny BERT with a tokenizer, and some text."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 512


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English prose of some 100 kB."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:25]))
    return file


@pytest.fixture(scope="session")
def words(text_file: Path) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, words: transformers.PreTrainedTokenizerFast) -> Path:
    """A random Llama of 4 blocks, width 64, grouped-query attention, tied embeddings."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, words: transformers.PreTrainedTokenizerFast) -> Path:
    """A random BERT of 3 blocks, width 64."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    transformers.BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
