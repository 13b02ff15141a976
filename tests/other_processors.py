"""A test file again, compiled for processors with other vectors than this one's."""

import os
import subprocess
import sys

import pytest

each = pytest.mark.parametrize("features", ["+avx,+avx2,+fma", "+avx,+avx2,+fma,+avx512f", ""])


def run_tests(file: str, features: str) -> None:
    """The quick tests of `file`, on a processor that has these features of numba's names alone."""
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-m", "pytest", "-q", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
