"""The examples do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_digits_are_learnt_on_the_chip():
    """Needs the network once, or the digits in the user's cache."""
    found = runpy.run_path(str(EXAMPLES / "mnist.py"))["train"]("edge", epochs=8)
    assert found["accuracy"] >= 0.975
