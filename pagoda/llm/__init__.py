"""Language models: weights, tokenizer, chat template and text generation.

Enters: a GGUF file, or any Llama-class Hugging Face model on any torch device, and text.
Leaves: token ids and text, one token at a time.
May import: `pagoda.pytorch`, torch, transformers, gguf, tokenizers, jinja2, numpy.

Reading order: `errors`, `find`, `gguf`, `model`, `tokenizer`, `generate`, `session`; `tiny_model`
makes small random models and files for tests. Only `model`, `session`, `tiny_model` and the methods
of `gguf.ModelFile` that return weights or a config load torch: a chat with an already compiled
program does without it. For that reason nothing is imported here before it is asked for.
"""

from importlib import import_module

_HOME = {
    "ModelError": "errors",
    "find_weights": "find",
    "ModelFile": "gguf",
    "build_model": "model",
    "load_model": "model",
    "Tokenizer": "tokenizer",
    "TokenizerParts": "tokenizer",
    "Generation": "generate",
    "Sampler": "generate",
    "Sampling": "generate",
    "Session": "generate",
    "extend": "generate",
    "TorchSession": "session",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
