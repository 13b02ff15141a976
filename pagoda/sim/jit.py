"""Compilation: numba settings, a cache that knows every source file, raw memory, fused fma.

numba's own on-disk cache looks at the file of the outermost function only, so an edited callee
gives a stale result. Here the stamp of a cache entry is a hash over all sources that can end up
in the compiled code, and a cache that cannot be read or written costs a warning, not the launch.

The compiled code addresses memory by host address (a plain integer), so one compiled loop serves
SRAM, ACC, DMEM and DRAM. Every caller checks bounds first; nothing here does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
import warnings
from functools import cache
from pathlib import Path

import numba
import platformdirs
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.extending import intrinsic

CACHE_VARIABLE = "PAGODA_CACHE_DIR"

# Division by zero follows IEEE 754 instead of raising; no fastmath, so nothing is contracted.
# Nothing compiled here allocates, and without the runtime of those that do (nrt) an array passed on
# costs no atomic count of references: they took a sixth of a simulated decode step.
_OPTIONS = {"error_model": "numpy", "nogil": True, "_nrt": False}


# What compiled code takes from isa: table coefficients and the numbers of fault kinds.
_ISA_SOURCES = ("fault.py", "numbers.py", "tables.py")
# Stale entries are deleted after this long; other checkouts may still be using younger ones.
_STALE_SECONDS = 7 * 24 * 3600


@cache
def source_stamp() -> str:
    """Hash of every file whose text can reach the compiled code."""
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for path in [*sorted(here.glob("*.py")), *(here.parent / "isa" / n for n in _ISA_SOURCES)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_directory() -> Path:
    """Where compiled code is kept: $PAGODA_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("pagoda"))


class _Locator:
    """Tells numba's cache where its files are and when they are out of date."""

    def __init__(self, py_func, py_file):
        self._py_file = py_file

    def ensure_cache_path(self):
        os.makedirs(self.get_cache_path(), exist_ok=True)

    def get_cache_path(self):
        return str(cache_directory() / "sim")

    def get_source_stamp(self):
        return source_stamp()

    def get_disambiguator(self):
        return source_stamp()[:16]

    @classmethod
    def from_function(cls, py_func, py_file):
        return cls(py_func, py_file)


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):
    """numba's function cache, except that trouble with the files never stops a launch."""

    _impl_class = _CacheImpl

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except OSError:
            return None
        except Exception:  # noqa: BLE001 - damaged files: whatever unpickling may raise
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
            _delete_stale(Path(self.cache_path))
        except OSError as error:
            warnings.warn(
                f"pagoda: cannot keep compiled code in {self.cache_path} ({error.strerror}); every "
                f"start will compile again; make the folder writable or set {CACHE_VARIABLE}",
                RuntimeWarning,
                stacklevel=2,
            )


def _delete_stale(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)


def jit(function):
    """Compile for callers that are compiled themselves, once for all integer constants.

    numba would compile again for every combination of constants that a call passes.
    """
    dispatcher = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)(function)
    resolve = dispatcher.get_call_template

    def resolve_without_constants(args, kws):
        return resolve(tuple(types.unliteral(arg) for arg in args), kws)

    dispatcher.get_call_template = resolve_without_constants
    return dispatcher


def cached_jit(function):
    """Compile for Python callers, and keep the machine code, callees included, on disk."""
    dispatcher = numba.njit(no_cfunc_wrapper=True, **_OPTIONS)(function)
    dispatcher._cache = _Cache(function)  # what numba's cache=True does, with our cache
    return dispatcher


# Raw memory --------------------------------------------------------------------------------------


def _loader(numba_type, bits, to_lane):
    """An intrinsic (base, index) -> the element at base + index * size, as `numba_type`."""

    @intrinsic
    def load(typing_context, base, index):
        def generate(context, builder, signature, arguments):
            base, index = arguments
            element = ir.FloatType() if bits is None else ir.IntType(bits)
            pointer = builder.inttoptr(base, element.as_pointer())
            return to_lane(builder, builder.load(builder.gep(pointer, [index]), align=1))

        return numba_type(types.int64, types.int64), generate

    return load


def _storer(numba_type, bits):
    """An intrinsic (base, index, value): the low bits of value to base + index * size."""

    @intrinsic
    def store(typing_context, base, index, value):
        def generate(context, builder, signature, arguments):
            base, index, value = arguments
            element = ir.FloatType() if bits is None else ir.IntType(bits)
            if bits is not None and bits < value.type.width:
                value = builder.trunc(value, element)
            pointer = builder.inttoptr(base, element.as_pointer())
            builder.store(value, builder.gep(pointer, [index]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), generate

    return store


def _same(builder, value):
    return value


def _zero_extended(builder, value):
    return builder.zext(value, ir.IntType(32))


def _sign_extended(builder, value):
    return builder.sext(value, ir.IntType(32))


load_f32 = _loader(types.float32, None, _same)
load_i32 = _loader(types.int32, 32, _same)
load_u32 = _loader(types.uint32, 32, _same)
load_i64 = _loader(types.int64, 64, _same)
load_u16 = _loader(types.int32, 16, _zero_extended)
load_i16 = _loader(types.int32, 16, _sign_extended)
load_u8 = _loader(types.int32, 8, _zero_extended)
load_i8 = _loader(types.int32, 8, _sign_extended)
store_f32 = _storer(types.float32, None)
store_i32 = _storer(types.int32, 32)
store_i64 = _storer(types.int64, 64)
store_16 = _storer(types.int32, 16)
store_8 = _storer(types.int32, 8)


@intrinsic
def copy_bytes(typing_context, target, source, nbytes):
    """memmove(target, source, nbytes); the two may overlap."""

    def generate(context, builder, signature, arguments):
        target, source, nbytes = arguments
        byte = ir.IntType(8).as_pointer()
        cgutils.raw_memmove(
            builder, builder.inttoptr(target, byte), builder.inttoptr(source, byte), nbytes, 1
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def zero_bytes(typing_context, target, nbytes):
    """memset(target, 0, nbytes)."""

    def generate(context, builder, signature, arguments):
        target, nbytes = arguments
        pointer = builder.inttoptr(target, ir.IntType(8).as_pointer())
        cgutils.memset(builder, pointer, nbytes, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


# Words that threads share -------------------------------------------------------------------------


@intrinsic
def atomic_load(typing_context, address):
    """The int64 at `address`; what its writer stored before it is visible then."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(typing_context, address, value):
    """Store an int64; who loads it sees all that was stored before."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        pointer = builder.inttoptr(address, ir.IntType(64).as_pointer())
        builder.store_atomic(value, pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_add(typing_context, address, value):
    """Add to the int64 at `address`; returns what was there."""

    def generate(context, builder, signature, arguments):
        address, value = arguments
        pointer = builder.inttoptr(address, ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, value, "acq_rel")

    return types.int64(types.int64, types.int64), generate


# What tells the processor that a loop only waits; on others the loop does without.
_PAUSE = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}


@intrinsic
def pause(typing_context):
    """For the body of a loop that waits for another thread."""

    def generate(context, builder, signature, arguments):
        machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine())
        hint = _PAUSE.get(machine or platform.machine())
        if hint is not None:
            name, numbers = hint
            word = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [word] * len(numbers))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [word(number) for number in numbers])
        return context.get_dummy_value()

    return types.void(), generate


# Threads that wait for another without giving way keep it from running where there are more threads
# than processors. Windows has no such function; its scheduler evens this out by itself.
_GIVE_WAY = "sched_yield"


@intrinsic
def give_way(typing_context):
    """Let another thread have the processor, if one wants it."""

    def generate(context, builder, signature, arguments):
        if binding.address_of_symbol(_GIVE_WAY) is not None:
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, _GIVE_WAY), [])
        return context.get_dummy_value()

    return types.void(), generate


# Bits and fused multiply-add ---------------------------------------------------------------------


@intrinsic
def float_bits(typing_context, value):
    """The pattern of a binary32, as int32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def bits_float(typing_context, value):
    """The binary32 of an int32 pattern."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def fma_f32(typing_context, a, b, c):
    """a * b + c with one rounding."""

    def generate(context, builder, signature, arguments):
        single = ir.FloatType()
        kind = ir.FunctionType(single, [single] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32")
        return builder.call(fma, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _unary(name):
    @intrinsic
    def call(typing_context, value):
        def generate(context, builder, signature, arguments):
            single = ir.FloatType()
            kind = ir.FunctionType(single, [single])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.f32")
            return builder.call(function, arguments)

        return types.float32(types.float32), generate

    return call


sqrt_f32 = _unary("sqrt")
floor_f32 = _unary("floor")
ceil_f32 = _unary("ceil")
trunc_f32 = _unary("trunc")
round_even_f32 = _unary("roundeven")


@intrinsic
def leading_zeros(typing_context, value):
    """Zero bits above the highest one bit of an int64; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), generate
