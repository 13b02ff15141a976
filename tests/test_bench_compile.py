"""`pagoda bench compile` on a model of two layers: what is kept serves new processes and shapes."""

import json

import pytest

from pagoda.llm.tiny_model import random_state, tiny_config, write_gguf


@pytest.mark.slow
def test_kept_code_serves_other_processes_and_shapes(tmp_path, pagoda):
    file = tmp_path / "tiny.gguf"
    config = tiny_config()
    write_gguf(file, config, random_state(config))
    code, out, _ = pagoda("bench", "compile", "--model", str(file), "--chip", "tiny", "--json")
    row = json.loads(out.splitlines()[-1])
    assert code == 0
    assert row["second_shape_compiles"] == 0
    assert row["warm_s"] < row["cold_s"]


def test_a_file_that_is_no_model(tmp_path, pagoda):
    file = tmp_path / "notes.gguf"
    file.write_text("no model")
    code, _, err = pagoda("bench", "compile", "--model", str(file))
    assert code == 1
    assert err == (
        f"error: {file}: a GGUF file starts with the bytes 'GGUF', but it starts with b'no m'. "
        "Choose a Llama-architecture GGUF file, such as SmolLM2's.\n"
    )
