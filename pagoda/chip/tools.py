"""Outside tools: found, run with a time limit, and their failures told in one message.

This module needs nothing that `make setup-chip` installs, so that what is missing can be named.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "PAGODA_CACHE_DIR"
REMEDY = "run `make setup-chip`"
PACKAGE = '"pagoda-stack[chip]"'  # what pip installs for this storey
SAID = 3000  # characters of a failed tool's output that are shown


class ToolError(Exception):
    """A tool is missing, failed or took too long; the message names it and what to do."""


def cache_folder() -> Path:
    """Where compiled models are kept: $PAGODA_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return (Path(chosen) if chosen else Path(platformdirs.user_cache_dir("pagoda"))) / "rtl"


def find(*names: str, package: str) -> str:
    """Path of the first of these programs that exists; `package` installs it (Debian).

    Raises ToolError if there is none.
    """
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolError(f"{names[0]}: not found; {REMEDY}, or apt-get install {package}")


def run(
    command: Sequence[object], folder: Path, tool: str, seconds: float,
    env: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Run a tool in a folder; what it printed. Raises ToolError: it failed, or ran too long."""
    try:
        done = subprocess.run(
            [str(part) for part in command], cwd=folder, env={**os.environ, **(env or {})},
            capture_output=True, check=False, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ToolError(
            f"{tool}: still running after {seconds:g} s and stopped; choose a smaller chip"
        ) from error
    except OSError as error:
        raise ToolError(f"{tool}: cannot be started ({error.strerror}); {REMEDY}") from error
    said = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode:
        raise ToolError(
            f"{tool}: failed with exit status {done.returncode}: {said[-SAID:].strip()}"
        )
    return said


def require_package(*names: str) -> None:
    """Raises ToolError if one of these Python packages is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ToolError(f"{name}: not installed; {REMEDY}, or pip install {PACKAGE}")
