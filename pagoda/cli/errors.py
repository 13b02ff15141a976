"""The exceptions whose message is meant for the user as it stands."""

from pagoda.chip.tools import ToolError
from pagoda.compiler.errors import CompileError, ModelFileError, Unsupported
from pagoda.isa.chip import ChipError
from pagoda.llm import ModelError
from pagoda.runtime import DeviceFault, DeviceLost, OutOfDeviceMemory, ServiceError
from pagoda.train.errors import TrainError

USER_ERRORS = (
    ChipError, CompileError, ModelError, ModelFileError, DeviceFault, DeviceLost,
    OutOfDeviceMemory, ServiceError, ToolError, TrainError, Unsupported,
)  # fmt: skip


def user_error(error: BaseException) -> BaseException | None:
    """The error for the user that `error` is, or that it was raised for: torch.compile packs what
    a back end raises in exceptions of its own, as `inner_exception`. None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, USER_ERRORS):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return cause
