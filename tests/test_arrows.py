"""The architecture as a test: which storey may import which, and who owns each heavy dependency.

Imports inside functions and under TYPE_CHECKING count, and so does `import_module` of a written
name. The package's own `__init__` may reach every storey, but only inside a function.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pagoda"
MAY_IMPORT = {  # from the ground up: a storey stands only on storeys above it in this table
    "isa": "",
    "chip": "isa",
    "sim": "isa",
    "compiler": "isa",
    "kernels": "isa compiler",
    "runtime": "isa sim compiler",
    "pytorch": "isa sim compiler kernels runtime",
    "llm": "isa compiler runtime pytorch",
    "train": "isa compiler runtime pytorch llm",
    "cli": "isa chip sim compiler kernels runtime pytorch llm train",
}
OWNERS = {
    "amaranth": "chip",
    "numba": "sim",
    "llvmlite": "compiler sim",
    "elftools": "compiler",
    "subprocess": "chip runtime cli",
    "torch": "pytorch llm train",
    "transformers": "pytorch llm",
    "safetensors": "pytorch llm train",
    "gguf": "llm",
    "tokenizers": "llm train",
    "onnx": "pytorch",
    "msgpack": "runtime",
    "jinja2": "llm",
    "click": "cli",
    "prometheus_client": "cli",
    "rich": "cli",
}


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import below `tree`, in a file of the given package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, node.module) if node.module else base
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def complaints(package: Path) -> Iterator[str]:
    """One line for each import in the package folder that breaks a rule."""
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        storey = where.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        names = list(imports(tree, ("pagoda", *where.parent.parts)))
        if storey == "__init__":
            lazy = {
                found
                for function in ast.walk(tree)
                if isinstance(function, ast.FunctionDef)
                for found in imports(function, ("pagoda",))
            }
            for line, name in names:
                if (line, name) not in lazy and name.split(".")[0] in {"pagoda", *OWNERS}:
                    yield f"pagoda/{where}:{line}: import {name} inside a function, when needed"
            continue
        if storey not in MAY_IMPORT:
            yield f"pagoda/{where}: {storey} is not a storey: move the file, or add it to the table"
            continue
        for line, name in names:
            first, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if first == "pagoda":
                if target in MAY_IMPORT and target not in {storey, *MAY_IMPORT[storey].split()}:
                    yield f"pagoda/{where}:{line}: {storey} may not import {target}"
            elif storey == "isa" and first not in {"numpy", *sys.stdlib_module_names}:
                yield f"pagoda/{where}:{line}: isa may import only numpy and the standard library"
            elif first in OWNERS and storey not in OWNERS[first].split():
                yield f"pagoda/{where}:{line}: only {OWNERS[first]} may import {first}"


def test_arrows():
    assert list(complaints(PACKAGE)) == []


def test_there_is_something_to_check():
    storeys = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    assert {"isa", "llm"} <= storeys


def test_the_table_has_no_cycle():
    seen = set()
    for storey, below in MAY_IMPORT.items():
        assert set(below.split()) <= seen, f"{storey} is listed before something it imports"
        seen.add(storey)
    assert {owner for owners in OWNERS.values() for owner in owners.split()} <= seen


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("sim/core.py", "from pagoda.compiler import ir", "sim may not import compiler"),
        ("sim/core.py", "from ..compiler.ir import Loop", "sim may not import compiler"),
        ("sim/core.py", "from .. import compiler", "sim may not import compiler"),
        ("sim/a/b.py", "from ...runtime import x", "sim may not import runtime"),
        ("llm/a.py", "def f():\n    import pagoda.sim", "llm may not import sim"),
        ("llm/a.py", "import_module('pagoda.chip')", "llm may not import chip"),
        ("runtime/a.py", "import torch.nn", "only pytorch llm train may import torch"),
        ("kernels/a.py", "from llvmlite import ir", "only compiler sim may import llvmlite"),
        ("isa/a.py", "import ml_dtypes", "isa may import only numpy and the standard library"),
        ("tools/a.py", "", "tools is not a storey: move the file, or add it to the table"),
        ("__init__.py", "from .sim import run", "import pagoda.sim.run inside a function"),
    ],
)
def test_the_check_finds(tmp_path, file, code, complaint):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    (found,) = complaints(tmp_path)
    assert complaint in found and found.startswith(f"pagoda/{file}")


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("runtime/a.py", "from ..compiler import ir\nfrom . import memory\nimport pagoda.sim"),
        ("isa/a.py", "import dataclasses\nimport numpy as np\nfrom .chip import Chip"),
        ("cli.py", "import click\nfrom pagoda import __version__"),
        ("__init__.py", "def profile():\n    from .runtime import profile"),
    ],
)
def test_the_check_passes(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert list(complaints(tmp_path)) == []


def test_importing_pagoda_loads_nothing_heavy():
    code = f"import sys, pagoda\nassert not {set(OWNERS) - {'subprocess'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
