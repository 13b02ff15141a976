"""The benchmarks of whole models, on small ones."""

import pytest
from transformers import BertConfig

from pagoda.isa import PRESETS
from pagoda.llm import bert
from pagoda.train import figures
from pagoda.train.gpt import GPTConfig


@pytest.mark.slow
def test_a_training_step():
    config = GPTConfig(layers=2, width=64, heads=2, context=32, vocabulary=128)
    found = figures.measure(PRESETS["edge"], config, 2, 32)
    assert found["loss"] == pytest.approx(found["torch_loss"], rel=2e-3)
    parts = [found[f"{name}_cycles"] for name in figures.PARTS]
    assert sum(parts) == found["cycles"] and min(parts) > 0
    assert found["utilisation"] == round(found["macs"] / 256 / found["cycles"], 4)


@pytest.mark.slow
def test_inference_of_bert():
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, attn_implementation="sdpa",
    )  # fmt: skip
    (found,) = bert.measure(PRESETS["edge"], 2, (32,), config)["runs"]
    linear, attention, pooler = 64 * (4 * 64**2 + 2 * 64 * 128), 2 * 64 * 32 * 64, 2 * 64**2
    assert found["macs"] == 2 * (linear + attention) + pooler
    assert found["relative_error"] < 0.03
    assert found["utilisation"] == round(found["macs"] / 256 / found["cycles"], 4)
