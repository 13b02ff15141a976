"""What all tests share: hypothesis without wall-clock limits, and the real weights."""

import pytest
from hypothesis import settings

from pagoda.llm import ModelError, find_weights

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
