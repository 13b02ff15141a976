"""`python -m tests.operation_table` writes docs/operations.md from the last results;
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

    import pagoda
    from tests.operation_cases import OPERATIONS, dtypes_of, judge

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.operation_table", description=__doc__)
    parser.add_argument("--run", nargs="*", metavar="NAME", help="judge these first; none: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--types", nargs="*", default=[], help="float32, ...; none: all")
    parser.add_argument("--samples", type=int, default=2, help="samples of float32; of others 1")
    arguments = parser.parse_args()
    if arguments.run is not None:
        from tests.operation_cases import OPERATIONS

        names = arguments.run or list(OPERATIONS)
        run(names, arguments.results, arguments.samples, arguments.types)


if __name__ == "__main__":
    main()
