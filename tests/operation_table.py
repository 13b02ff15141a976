"""`python tests/operation_table.py` writes docs/operations.md from the last results;
`--run [NAME ...]` judges operations first (all: half an hour or so) and keeps the results."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "golden" / "operations.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "operations.md"
LIMIT = 150  # seconds for all types of one operation


def _judge(names: Any, found: Any, count: int, types: list[str]) -> None:
    """The child process: names in, (name, {type: verdict}) out."""
    import torch
    from operation_cases import OPERATIONS, dtypes_of, judge

    import pagoda

    torch.set_num_threads(1)
    pagoda.use_chip("edge")
    for name in iter(names.get, None):
        op = OPERATIONS[name]
        for dtype in dtypes_of(op):
            short = str(dtype).removeprefix("torch.")
            if not types or short in types:
                several = count if dtype is torch.float32 else 1
                found.put((name, short, asdict(judge(op, dtype, several))))
        found.put((name, None, None))


class _Judge:
    """A child process that judges; it is replaced when it takes too long or dies."""

    def __init__(self, count: int, types: list[str]) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (count, types)
        self._start()

    def _start(self) -> None:
        self._names, self._found = self._context.Queue(), self._context.Queue()
        self._process = self._context.Process(
            target=_judge, args=(self._names, self._found, *self._arguments), daemon=True
        )
        self._process.start()

    def judge(self, name: str) -> dict[str, dict]:
        self._names.put(name)
        verdicts: dict[str, dict] = {}
        while True:
            try:
                _, dtype, verdict = self._found.get(timeout=LIMIT)
            except queue.Empty:  # it hangs or is dead
                alive = self._process.is_alive()
                self._process.kill()
                self._start()
                remark = f"longer than {LIMIT} s" if alive else "the process died"
                verdicts["next type"] = {"outcome": "crashes", "gradient": False, "host": [],
                                         "remark": remark}  # fmt: skip
                return verdicts
            if dtype is None:
                return verdicts
            verdicts[dtype] = {**verdict, "host": list(verdict["host"])}

    def close(self) -> None:
        self._names.put(None)


def run(names: list[str], results: Path, count: int, types: list[str]) -> None:
    """Judges operations and keeps what is found; verdicts on other types stay as they are."""
    child = _Judge(count, types)
    for name in names:
        kept = json.loads(results.read_text()) if results.exists() else {}
        kept[name] = {**kept.get(name, {}), **child.judge(name)}
        lines = [f"{json.dumps(n)}: {json.dumps(kept[n])}" for n in sorted(kept)]
        results.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(name, {d: v["outcome"] for d, v in kept[name].items()}, flush=True)
    child.close()


_WORDS = {"passes": "yes", "refused": "refused", "wrong": "**wrong**", "crashes": "**fails**",
          "no samples": ""}  # fmt: skip
_TYPES = ("float32", "bfloat16", "int64", "bool")
_HEAD = """# Operations of PyTorch on the device

Written by `python tests/operation_table.py` from the last results; do not edit. The judge is
torch's own operator database: its sample inputs, run here and on the CPU, forward and backward,
contiguous and strided. *yes*: the same values, within 1e-4 for float32 and 1.6e-2 for bfloat16;
*refused*: an error that names the operation and says what to do instead; empty: torch's database
has no samples of the type. int64 stands for all integers; they are computed in 32 bits, and a
value that does not fit is a fault (`INT64_OVERFLOW`), never a wrong result. The gradient column
says whether gradients were compared. Operations computed on the host are counted by
`torch.pagoda.fallbacks()`.

Left out: decompositions of matrices, Fourier transforms, complex numbers, sparse tensors, special
functions that networks hardly use; convolution and attention have kernels and tests of their own.
"""


def document(results: dict[str, dict[str, dict]]) -> str:
    """The text of docs/operations.md."""
    counts = {t: dict.fromkeys(("passes", "refused", "wrong", "crashes"), 0) for t in _TYPES}
    host = 0
    rows = []
    for name, verdicts in sorted(results.items()):
        if not any(v["outcome"] != "no samples" for v in verdicts.values()):
            continue
        for kind, verdict in verdicts.items():
            if verdict["outcome"] in counts[kind]:
                counts[kind][verdict["outcome"]] += 1
        cells = [_WORDS[verdicts[t]["outcome"]] if t in verdicts else "" for t in _TYPES]
        gradient = "yes" if any(v["gradient"] for v in verdicts.values()) else ""
        on_host = sorted({n for v in verdicts.values() for n in v["host"]})
        host += bool(on_host)
        remark = ", ".join(f"`{n}`" for n in on_host) + (" on the host" if on_host else "")
        rows.append(f"| `{name}` | {' | '.join(cells)} | {gradient} | {remark} |")
    lines = ["| type | passes | refused | wrong | fails |", "|---|---|---|---|---|"]
    lines += [f"| {kind} | {' | '.join(map(str, c.values()))} |" for kind, c in counts.items()]
    table = [f"| operation | {' | '.join(_TYPES)} | gradient | remark |", "|---" * 7 + "|"]
    summary = f"{len(rows)} operations, {host} of them partly on the host:"
    return "\n".join([_HEAD, summary, "", *lines, "", *table, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/operation_table.py", description=__doc__)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="judge these first; none: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--types", nargs="*", default=[], help="float32, ...; none: all")
    parser.add_argument("--samples", type=int, default=2, help="samples of float32; of others 1")
    arguments = parser.parse_args()
    if arguments.run is not None:
        from operation_cases import OPERATIONS

        names = arguments.run or list(OPERATIONS)
        run(names, arguments.results, arguments.samples, arguments.types)
    if arguments.results == RESULTS:
        DOCUMENT.write_text(document(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
