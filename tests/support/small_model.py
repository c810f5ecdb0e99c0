"""A small model with a tokenizer of words w3, w4, ..., on disk, as training stacks load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

V = 500


def tokenizer_of(vocab_size: int) -> Any:
    """Whose words are w3, w4, ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, **special)


def save_model(folder: Path, **changes: Any) -> None:
    """The tokenizer, and a model of random weights: logits for which the gates of tokens differ."""
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.LlamaConfig(**sizes | changes)
    tokenizer_of(config.vocab_size).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
