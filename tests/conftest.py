"""What all tests share: hypothesis without wall-clock limits, real weights, the command line."""

import os
import sys

import pytest
from hypothesis import settings

from pagoda import cli
from pagoda.llm import ModelError, find_weights

# A device service that happens to run here is not what is tested.
os.environ["PAGODA_DEVICE"] = "embedded"

# A busy machine must not fail a test.
settings.register_profile("pagoda", deadline=None, print_blob=True)
settings.load_profile("pagoda")


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct."""
    try:
        return find_weights()
    except ModelError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def pagoda(monkeypatch, capsys):
    """Runs a command line as the `pagoda` script does: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pagoda", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
