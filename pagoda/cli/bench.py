"""`pagoda bench`: each benchmark prints a table, and with --json one object on its last line."""

import importlib

import click

BENCHMARKS = {
    "compile": "First calls of a compiled language model: cold, warm, another shape.",
    "gemm": "Matrix products: array utilisation, simulation speed.",
    "rtl": "The RTL against the simulator: bits, cycles, speed.",
    "resnet50": "ResNet-50, int8 and bf16: array utilisation, scaling to 64 x 64.",
    "llm": "SmolLM2: decode and prefill on the chip, speed on the host.",
    "bert": "BERT-base: inference.",
    "os": "A shared device: launch overhead, fairness, survival of kills, faults and resets.",
    "train": "GPT-2 with 124 M parameters: a training step.",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in BENCHMARKS:
            return None
        return getattr(importlib.import_module(f"pagoda.cli.bench_{name}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Benchmarks"):
            formatter.write_dl(list(BENCHMARKS.items()))


@click.group(cls=_Lazy)
def bench() -> None:
    """Measure: cycles, utilisation, host speed; --json for scripts."""
