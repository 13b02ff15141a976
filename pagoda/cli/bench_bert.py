"""`pagoda bench bert`: inference of BERT-base on the simulated chip."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from pagoda.cli.options import device_chip_option, json_option
from pagoda.isa.chip import Chip

BATCH = 8
LENGTHS = (128, 512)


@click.command()
@device_chip_option
@json_option
def bert(chip: Chip, as_json: bool) -> None:
    """BERT-base, batch 8, sequences of 128 and 512 tokens, bfloat16."""
    from pagoda.llm.bert import measure

    with Console(stderr=True).status("measuring beside torch"):
        result = measure(chip, BATCH, LENGTHS)
    table = Table("", *(f"{row['length']} tokens" for row in result["runs"]), box=None)
    for name in result["runs"][0]:
        table.add_row(name.replace("_", " "), *(str(row[name]) for row in result["runs"]))
    Console().print(table)
    if as_json:
        click.echo(json.dumps(result))
