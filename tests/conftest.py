"""What all tests share: hypothesis without wall-clock limits, and the real weights."""

import pytest
from hypothesis import settings

from pagoda.llm import ModelError, find_weights

# A busy machine must not fail a test; `make test-full` draws many more examples.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("full", deadline=None, print_blob=True, max_examples=100_000)
settings.load_profile("default")


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of SmolLM2-135M-Instruct."""
    try:
        return find_weights()
    except ModelError as missing:
        pytest.skip(str(missing))
