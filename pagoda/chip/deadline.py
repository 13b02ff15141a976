"""Tools that start others: run within a common time limit and stopped with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagoda.chip.tools import REMEDY, SAID, ToolError


@dataclass(frozen=True)
class Deadline:
    """The moment until which all tools together may run; `seconds` is what the user allowed."""

    seconds: float
    end: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(seconds, time.monotonic() + seconds)

    def run(self, command: Sequence[object], folder: Path, tool: str) -> str:
        """What a tool printed, run in a folder. Raises ToolError: it failed, or time is up."""
        try:
            process = subprocess.Popen(
                [str(part) for part in command], cwd=folder, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ToolError(f"{tool}: cannot be started ({error.strerror}); {REMEDY}") from error
        try:
            said, _ = process.communicate(timeout=max(self.end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired as error:
            raise ToolError(
                f"{tool}: not done within the limit of {self.seconds:g} s and stopped; give more "
                "--seconds, or choose a smaller --unit or chip"
            ) from error
        finally:
            if process.poll() is None:  # time is up, or the user pressed Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = said.decode(errors="replace")
        if process.returncode:
            raise ToolError(
                f"{tool}: failed with exit status {process.returncode}: {text[-SAID:].strip()}"
            )
        return text
