"""How a benchmark with one row of figures shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click
from rich.console import Console
from rich.table import Table


def show_figures(row: Mapping[str, object], as_json: bool) -> None:
    """A line for each figure; with as_json one object on the last line as well."""
    table = Table(box=None, show_header=False)
    for name, value in row.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
    if as_json:
        click.echo(json.dumps(row))
