"""What Dynamo spends on a first call that nobody has asked for.

Of the first call of a 30-layer SmolLM2 with everything kept (2.9 s), 0.2 s went to reading its
source files for the names of functions in a log that is off, and 0.3 s to Python's collector,
which walked through a million objects of torch and transformers and freed next to none.
"""

from __future__ import annotations

import gc
import logging

from torch._dynamo import output_graph, symbolic_convert
from torch._dynamo.callback import callback_handler
from torch._dynamo.funcname_cache import get_funcname

_LOGS = (
    output_graph.trace_call_log, symbolic_convert.trace_call_log, symbolic_convert.trace_source_log,
)  # fmt: skip


def _name_in_logs(filename: str, line: int) -> str | None:
    """As `get_funcname`, of whose answer only these logs make use."""
    wanted = any(log.isEnabledFor(logging.DEBUG) for log in _LOGS)
    return get_funcname(filename, line) if wanted else None


class _Collector:
    """While torch compiles, Python's collector leaves alone what was there before."""

    def __init__(self) -> None:
        self._frozen = False

    def begin(self, _: object) -> None:
        self._frozen = gc.isenabled() and not gc.get_freeze_count()  # else somebody else has
        if self._frozen:
            gc.freeze()

    def end(self, _: object) -> None:
        if self._frozen:
            gc.unfreeze()


def mend() -> None:
    """Has Dynamo do without; the collector walks again after `torch._dynamo.reset`."""
    symbolic_convert.get_funcname = _name_in_logs
    collector = _Collector()
    callback_handler.register_start_callback(collector.begin)
    callback_handler.register_end_callback(collector.end)
