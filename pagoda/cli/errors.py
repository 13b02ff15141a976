"""The exceptions whose message is meant for the user as it stands."""

from pagoda.compiler.errors import CompileError
from pagoda.isa.chip import ChipError
from pagoda.llm import ModelError
from pagoda.runtime import DeviceFault, OutOfDeviceMemory

USER_ERRORS = (ChipError, CompileError, ModelError, DeviceFault, OutOfDeviceMemory)
