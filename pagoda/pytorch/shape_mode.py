"""Running torch on shapes alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def shapes_only(mode: FakeTensorMode) -> Iterator[FakeTensorMode]:
    """In the `with` block operations on the mode's tensors only find shapes and types. What torch
    refuses is raised; that it also logs it, with a traceback, is kept from the user."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with mode:
            yield mode
    finally:
        logger.disabled = before
