"""ONNX files that others have exported, on the chip: `make models` installs the packages from PyPI
that carry them."""

from __future__ import annotations

import json

import pytest
from packaged import packaged

FILES = {  # file, dimensions, multiply-adds
    "magika/models/standard_v3_3/model.onnx": (["--dim", "unk__214=1"], 366_717_952),
    "silero_vad/data/silero_vad_16k_sequence.onnx": (["--dim", "sequence_length=3"], 2_236_800),
    "silero_vad/data/silero_vad_openvino_16k.onnx": ([], 679_552),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_model_of_others(pagoda, file):
    dims, macs = FILES[file]
    code, out, err = pagoda("run", str(packaged(file)), *dims, "--check", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    assert found["macs"] == macs and found["fallbacks"] == {}
    assert found["checks"][0]["correct"] and found["checks"][0]["error"] < 1e-3
