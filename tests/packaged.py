"""Files of packages of which nothing else is used: trained weights, mostly."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def packaged(name: str) -> Path:
    """A file of an installed package, without importing it, or of one unpacked in $MODELS_DIR. The
    test is skipped if there is none."""
    found = (Path(folder) / name for folder in (os.environ.get("MODELS_DIR", "models"), *sys.path))
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        pytest.skip(f"{name} is not installed; `make models` installs it")
    return path
