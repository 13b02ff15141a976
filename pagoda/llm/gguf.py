"""Reading a Llama-architecture GGUF file: config, weights in Hugging Face names, tokenizer parts.

The format is parsed by the PyPI package `gguf`; `_Reader` adds bounds checks, so that a damaged
file ends in an error and never in an endless loop, and reads long arrays in one go.
"""

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from .errors import ModelError
from .tokenizer import TokenizerParts

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

ARCHITECTURE = "llama"
VERSIONS = (2, 3)
_HEADER_BYTES = 24  # magic, version, numbers of tensors and of metadata entries
DOWNLOAD_AGAIN = "Download or copy the file again."
OTHER_FILE = "Choose a Llama-architecture GGUF file, such as SmolLM2's."
_REQUIRED = object()


class _Truncated(Exception):
    """The file ends before something that it announces."""


class _Reader(gguf.GGUFReader):
    """gguf's reader with bounds checks and fast arrays (98,000 strings: 0.1 s instead of 2 s)."""

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise _Truncated(end)
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_item, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, count, start = gguf.GGUFValueType(int(raw_item[0])), int(length[0]), orig_offs + 12
        if item == gguf.GGUFValueType.STRING:
            strings, size = self._strings(start, count)
        elif item in self.gguf_scalar_to_np:
            strings = [self._get(start, self.gguf_scalar_to_np[item], count)]
            size = strings[0].nbytes
        else:
            raise ValueError(f"an array of {item.name} items")
        types = [gguf.GGUFValueType.ARRAY, item]
        return 12 + size, [raw_item, length, *strings], list(range(2, 2 + len(strings))), types

    def _strings(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
        data = np.asarray(self.data)  # slicing a plain view is ten times as fast as a memmap
        strings, offset = [], start
        for _ in range(count):
            try:
                (length,) = struct.unpack_from("<Q", data, offset)
            except struct.error:
                raise _Truncated(offset + 8) from None
            offset += 8 + length
            if offset > len(data):
                raise _Truncated(offset)
            strings.append(data[offset - length : offset])
        return strings, offset - start


class ModelFile:
    """One open GGUF file of a Llama-class model; nothing but its header is read until asked for.

    path: the file; tensors: name -> gguf.ReaderTensor, data still in the file.
    Every method raises ModelError when the file is damaged or asks for what Pagoda does not do.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._check_header()
        try:
            self._reader = _Reader(self.path)
        except _Truncated as cut:
            size = self.path.stat().st_size
            rule = f"the file announces at least {cut.args[0]} bytes"
            raise ModelError(self.path, rule, f"it ends after {size}", DOWNLOAD_AGAIN) from None
        except (ValueError, KeyError, IndexError, OverflowError) as why:
            rule = "its header must be well formed"
            raise ModelError(self.path, rule, f"there is {_text(why)}", DOWNLOAD_AGAIN) from why
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self.value("general.architecture", str)
        if architecture != ARCHITECTURE:
            raise ModelError(
                self.path,
                f"its architecture must be {ARCHITECTURE!r}",
                f"it is {architecture!r}",
                OTHER_FILE,
            )

    def _check_header(self) -> None:
        try:
            with self.path.open("rb") as file:
                head = file.read(8)
        except OSError as why:
            remedy = "Give the path of a readable GGUF file."
            value = f"opening it failed: {why.strerror}"
            raise ModelError(self.path, "the model file must be readable", value, remedy) from None
        if head[:4] != b"GGUF":
            rule = "a GGUF file starts with the bytes 'GGUF'"
            value = f"it starts with {head[:4]!r}" if head else "it is empty"
            raise ModelError(self.path, rule, value, OTHER_FILE)
        if len(head) < 8:
            rule = f"the file announces at least {_HEADER_BYTES} bytes"
            raise ModelError(self.path, rule, f"it ends after {len(head)}", DOWNLOAD_AGAIN)
        version = int.from_bytes(head[4:], "little")
        if version not in VERSIONS:
            rule = "it must be little-endian GGUF of version 2 or 3"
            raise ModelError(self.path, rule, f"its version field is {version}", OTHER_FILE)

    def value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The metadata entry `key`, which must be of `kind` (int, float, bool, str or list)."""
        field = self._reader.fields.get(key)
        if field is None:
            if default is not _REQUIRED:
                return default
            rule = f"its metadata must have {key}"
            raise ModelError(self.path, rule, "there is none", OTHER_FILE)
        try:
            value = field.contents()
        except UnicodeDecodeError as why:
            rule = f"its metadata {key} must be UTF-8 text"
            raise ModelError(self.path, rule, _text(why), DOWNLOAD_AGAIN) from None
        if type(value) is not kind:
            rule = f"its metadata {key} must be of type {kind.__name__}"
            raise ModelError(self.path, rule, f"it is {value!r:.60}", DOWNLOAD_AGAIN)
        return value

    def _number(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.value(f"{ARCHITECTURE}.{key}", kind, default)
        if not 0 < value < float("inf"):
            rule = f"its metadata {ARCHITECTURE}.{key} must be a positive number"
            raise ModelError(self.path, rule, f"it is {value}", DOWNLOAD_AGAIN)
        # A float was stored as binary32: take the shortest decimal that means the same, 1e-05.
        return float(str(np.float32(value))) if kind is float else value

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """The model's sizes, as keyword arguments of transformers' LlamaConfig; plain data.

        Sources: llama.cpp's keys `llama.*` and `tokenizer.ggml.*`; embeddings are tied exactly when
        the file has no output matrix, biases are there exactly when layer 0 has them.
        """
        hidden = self._number("embedding_length", int)
        heads = self._number("attention.head_count", int)
        kv_heads = self._number("attention.head_count_kv", int, heads)
        head_dim = self._number("attention.key_length", int, max(hidden // heads, 1))
        self._check_heads(hidden, heads, kv_heads, head_dim)
        self._check_rope(head_dim)
        theta = self._number("rope.freq_base", float, 10000.0)
        return {
            "vocab_size": self._vocabulary_size(),
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length", int),
            "num_hidden_layers": self._layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._number("context_length", int),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon", float),
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self.tensors,
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self._token_id("eos"),
            "pad_token_id": self._token_id("padding"),
        }

    def _layers(self) -> int:
        """The number of layers; a damaged one must not be counted up to."""
        layers, tensors = self._number("block_count", int), len(self.tensors)
        if layers > tensors:
            rule = "its layers must have tensors of their own"
            value = f"llama.block_count is {layers} and there are {tensors} tensors"
            raise ModelError(self.path, rule, value, DOWNLOAD_AGAIN)
        return layers

    def _vocabulary_size(self) -> int:
        tokens = len(self._list("tokenizer.ggml.tokens", str))
        size = self._number("vocab_size", int, tokens)
        if size < tokens:
            rule = "its vocabulary must be as large as its token list"
            value = f"llama.vocab_size is {size} and there are {tokens} tokens"
            raise ModelError(self.path, rule, value, DOWNLOAD_AGAIN)
        return size

    def _list(self, key: str, kind: type, default: Any = _REQUIRED) -> list:
        values = self.value(key, list, default)
        if not all(type(value) is kind for value in values):
            rule = f"its metadata {key} must be a list of {kind.__name__}"
            value = f"it holds {values[0]!r:.60}"
            raise ModelError(self.path, rule, value, DOWNLOAD_AGAIN)
        return values

    def _token_id(self, name: str) -> int | None:
        """The id of a special token ('bos', 'eos', 'padding'), or None."""
        key = f"tokenizer.ggml.{name}_token_id"
        id_ = self.value(key, int, None)
        tokens = len(self._list("tokenizer.ggml.tokens", str))
        if id_ is not None and not 0 <= id_ < tokens:
            rule = f"its metadata {key} must be one of its {tokens} tokens"
            raise ModelError(self.path, rule, f"it is {id_}", DOWNLOAD_AGAIN)
        return id_

    def _check_heads(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        if hidden % heads or heads % kv_heads or head_dim % 2:
            rule = "heads must divide the width, KV heads the heads, and a head have an even size"
            value = f"width {hidden}, heads {heads}, KV heads {kv_heads}, head size {head_dim}"
            raise ModelError(self.path, rule, value, DOWNLOAD_AGAIN)

    def _check_rope(self, head_dim: int) -> None:
        """Only plain rotary embedding over the whole head is known."""
        scaling = self.value("llama.rope.scaling.type", str, "none")
        turned = self._number("rope.dimension_count", int, head_dim)
        if scaling != "none" or turned != head_dim or "rope_freqs.weight" in self.tensors:
            rule = "rotary embedding must be unscaled and cover the whole head"
            factors = "with" if "rope_freqs.weight" in self.tensors else "without"
            value = f"scaling is {scaling!r}, {turned} of {head_dim} dimensions, {factors} factors"
            raise ModelError(self.path, rule, f"here {value}", OTHER_FILE)

    def config(self) -> "LlamaConfig":
        """The model's configuration as transformers' LlamaConfig."""
        from transformers import LlamaConfig

        return LlamaConfig(**self.hyperparameters)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every weight in binary32 under its Hugging Face name, one after the other, row order too.

        Without torch. A tied `lm_head.weight` does not come: it is the embedding.
        """
        layout = tensor_layout(self.hyperparameters)
        if extra := sorted(self.tensors.keys() - layout.keys()):
            rule = "a Llama-class model has no other tensors than embeddings, layers, norm, output"
            raise ModelError(self.path, rule, f"this file has {extra[0]!r}", OTHER_FILE)
        for name, (hf_name, shape, heads) in layout.items():
            yield hf_name, self._weight(name, shape, heads)

    def state_dict(self, dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
        """Every weight on the CPU as `dtype`, in Hugging Face names and row order.

        Dequantised in binary32, then rounded once. A tied `lm_head.weight` is the embedding itself,
        not a copy.
        """
        import torch

        state = {}
        for name, values in self.weights():
            # Where it is still the file's pages, torch needs memory of its own.
            owned = values if values.flags.writeable else values.copy()
            state[name] = torch.from_numpy(owned).to(dtype)
        if self.hyperparameters["tie_word_embeddings"]:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def _weight(self, name: str, shape: tuple[int, ...], heads: int) -> np.ndarray:
        """One tensor in binary32, dequantised, with llama.cpp's order of rotary rows undone."""
        if name not in self.tensors:
            rule = f"it must have the tensor {name!r}"
            raise ModelError(self.path, rule, "there is none", DOWNLOAD_AGAIN)
        tensor = self.tensors[name]
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            rule = f"the tensor {name!r} must have the shape {shape}"
            raise ModelError(self.path, rule, f"it has {found}", DOWNLOAD_AGAIN)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # damage is reported below
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            rule = f"the tensor {name!r} must be in a quantisation that the gguf package decodes"
            value = f"it is {tensor.tensor_type.name}"
            raise ModelError(self.path, rule, value, OTHER_FILE) from None
        if not np.isfinite(np.sum(values, dtype=np.float32)):
            rule = f"the weights in the tensor {name!r} must be finite"
            raise ModelError(self.path, rule, "some are infinite or NaN", DOWNLOAD_AGAIN)
        if heads:
            pairs = values.reshape(heads, shape[0] // heads // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(shape)
        return values

    def tokenizer_parts(self) -> TokenizerParts:
        """Vocabulary, merges, special ids and chat template, as plain data."""
        return TokenizerParts(
            source=str(self.path),
            model=self.value("tokenizer.ggml.model", str),
            pre=self.value("tokenizer.ggml.pre", str, ""),
            tokens=self._list("tokenizer.ggml.tokens", str),
            token_types=self._list("tokenizer.ggml.token_type", int),
            merges=self._list("tokenizer.ggml.merges", str, []),
            bos_id=self._token_id("bos"),
            eos_id=self._token_id("eos"),
            add_bos=self.value("tokenizer.ggml.add_bos_token", bool, False),
            chat_template=self.value("tokenizer.chat_template", str, None),
        )


def tensor_layout(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """llama.cpp's tensor name -> (Hugging Face name, shape [out, in], heads of rotary rows or 0).

    llama.cpp stores the rows of a query or key head as pairs (i, i + half) side by side, Hugging
    Face as two halves; `heads` tells how many heads to reorder.
    """
    width, inner, vocabulary = (
        config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    matrices = [  # name, Hugging Face name, rows, columns, rotary heads, has a bias
        ("attn_q", "self_attn.q_proj", queries, width, heads, config["attention_bias"]),
        ("attn_k", "self_attn.k_proj", keys, width, kv_heads, config["attention_bias"]),
        ("attn_v", "self_attn.v_proj", keys, width, 0, config["attention_bias"]),
        ("attn_output", "self_attn.o_proj", width, queries, 0, config["attention_bias"]),
        ("ffn_gate", "mlp.gate_proj", inner, width, 0, config["mlp_bias"]),
        ("ffn_up", "mlp.up_proj", inner, width, 0, config["mlp_bias"]),
        ("ffn_down", "mlp.down_proj", width, inner, 0, config["mlp_bias"]),
    ]
    norms = [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")]
    layout = {"token_embd.weight": ("model.embed_tokens.weight", (vocabulary, width), 0)}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        for name, hf_name, rows, columns, rotary, bias in matrices:
            parts = [("weight", (rows, columns))] + [("bias", (rows,))] * bias
            for part, shape in parts:
                layout[f"{ours}.{name}.{part}"] = (f"{theirs}.{hf_name}.{part}", shape, rotary)
        for name, hf_name in norms:
            layout[f"{ours}.{name}.weight"] = (f"{theirs}.{hf_name}.weight", (width,), 0)
    layout["output_norm.weight"] = ("model.norm.weight", (width,), 0)
    if not config["tie_word_embeddings"]:
        layout["output.weight"] = ("lm_head.weight", (vocabulary, width), 0)
    return layout


def _text(why: Exception) -> str:
    """The exception in one line, with its kind where it says nothing clear by itself."""
    return f"{type(why).__name__}: {' '.join(str(why).split())}"
