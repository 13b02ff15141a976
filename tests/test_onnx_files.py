"""ONNX files that others have exported, on the chip: those in the folder $MODELS_DIR, if there are.

`magika` 1.0.3 and `silero-vad` 6.2.3, both from PyPI, carry them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FILES = {  # file, dimensions, multiply-adds
    "magika/models/standard_v3_3/model.onnx": (["--dim", "unk__214=1"], 366_717_952),
    "silero_vad/data/silero_vad_16k_sequence.onnx": (["--dim", "sequence_length=3"], 2_236_800),
    "silero_vad/data/silero_vad_openvino_16k.onnx": ([], 679_552),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_model_of_others(pagoda, file):
    path = Path(os.environ.get("MODELS_DIR", "models")) / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    dims, macs = FILES[file]
    code, out, err = pagoda("run", str(path), *dims, "--check", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    assert found["macs"] == macs and found["fallbacks"] == {}
    assert found["checks"][0]["correct"] and found["checks"][0]["error"] < 1e-3
