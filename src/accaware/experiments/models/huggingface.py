"""Networks of `transformers`, by their name on the Hugging Face hub or their folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accaware.experiments.images import first_line

PREFIX = "hf:"


def pretrained(name: str, causal: bool) -> nn.Module:
    """The encoder, or with `causal` the language model, called "hf:NAME_OR_FOLDER", in float32.

    GPT-2's `Conv1D` becomes the `nn.Linear` that it is. `keep` names what stays in float unless the user says
    otherwise: the head over the vocabulary, and the encoder's pooler, which means of tokens do not use. Raises
    `ValueError` where it cannot be had.
    """
    transformers = _transformers()
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model: Any = _get(name, kind, dtype=torch.float32)
    model.config.use_cache = False  # nothing here generates text, and no exporter knows the cache
    for path, module in list(model.named_modules()):
        if type(module) is transformers.pytorch_utils.Conv1D:
            model.set_submodule(path, _linear(module))
    head = model.get_output_embeddings()
    outside = [path for path, m in model.named_modules() if (head is not None and m is head) or path == "pooler.dense"]
    model.keep = dict.fromkeys(outside, "float")
    return model


def tokenizer(name: str) -> Any:
    """The tokenizer that goes with the model. Raises `ValueError` where it cannot be had."""
    return _get(name, _transformers().AutoTokenizer)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"models of the Hugging Face hub need transformers: pip install 'accaware[hf]' ({error})"
        ) from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def _get(name: str, kind: Any, **options: Any) -> Any:
    if not name.startswith(PREFIX):
        raise ValueError(f"model {name!r} has no tokenizer; text needs {PREFIX}NAME_OR_FOLDER")
    try:
        return kind.from_pretrained(name.removeprefix(PREFIX), **options)
    except Exception as error:  # the hub's client raises dozens of types
        raise ValueError(f"model {name!r} cannot be had: {first_line(error)}") from error


def _linear(conv: Any) -> nn.Linear:
    """`Conv1D` computes x w + b with w [inputs, outputs]."""
    linear = nn.Linear(*conv.weight.shape)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
    return linear
