"""What every command does about Ctrl-C, `kill`, warnings and output that cannot be written."""

from __future__ import annotations

import _thread
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

_AGAIN_SECONDS = 0.05
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def manners() -> Iterator[None]:
    """Inside the `with` block Ctrl-C always arrives, and a warning is one line.

    Python drops an exception raised in a callback from native code, and LLVM calls back while it
    compiles: a Ctrl-C that falls there is delivered again a moment later. A plain `kill` ends the
    program as an exception does, so that a tool it has started ends with it.
    """
    unraisable, layout = sys.unraisablehook, warnings.formatwarning

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            unraisable(dropped)

    def one_line(message, category, filename, lineno, line=None) -> str:
        if category is RuntimeWarning:  # what Pagoda's own warnings are
            return f"warning: {message}\n"
        return layout(message, category, filename, lineno, line)

    def terminated(number: int, frame: object) -> None:
        sys.exit(128 + number)

    sys.unraisablehook, warnings.formatwarning = hook, one_line
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook, warnings.formatwarning = unraisable, layout


def drop_profiler_warning() -> None:
    """torch's optimizers mark their steps for a profiler; Dynamo warns that it drops the marks."""
    logging.getLogger("torch._dynamo.variables.ctx_manager").setLevel(logging.ERROR)


def write_error(error: OSError) -> str | None:
    """The message for output that does not fit where it goes; None for any other error.

    Nothing more is written to standard output then: Python would fail again when it ends.
    """
    if error.errno not in _NO_ROOM:
        return None
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    what = error.filename or "the output"
    return f"{what}: it must be written, but {error.strerror}; free some space or write elsewhere"
