"""Options that several commands share."""

import click

from pagoda.isa.chip import Chip, load_chip


def _load(context: click.Context, parameter: click.Parameter, value: str) -> Chip:
    return load_chip(value)


chip_option = click.option(
    "--chip",
    default="edge",
    show_default=True,
    metavar="NAME|FILE",
    callback=_load,
    help="A preset, or a .toml or .py chip file.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on the last line."
)
