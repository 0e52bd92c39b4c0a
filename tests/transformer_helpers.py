"""Tiny transformers of random weights, and a folder such as the Hugging Face hub has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'accaware[hf]'")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "cat", "dog", "house", "tree"]
WORDS += ["big", "small", "sees", "climbs", "near"]


def tiny(kind: str) -> Any:
    """A model of one layer, in evaluation mode: "bert", "llama" or "gpt2"."""
    torch.manual_seed(0)
    common = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 24, "max_position_embeddings": 32, "tie_word_embeddings": True}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**common))
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **common, num_key_value_heads=1, pad_token_id=0, bos_token_id=2, eos_token_id=3
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name:
            p.data.mul_(10)  # initial weights are so small that every layer hands on what it gets
    return model.eval()


def folder(kind: str, path: Path) -> Path:
    """Model and tokenizer (one token for a word) as `save_pretrained` writes them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(path)
    tiny(kind).save_pretrained(path)
    return path


def padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random tokens, each row padded on its right."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, len(WORDS), (len(lengths), max(lengths)), generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
