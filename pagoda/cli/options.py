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


def _of_service(context: click.Context, parameter: click.Parameter, value: str | None) -> Chip:
    if value is not None:
        return load_chip(value)
    from pagoda.runtime.service.discovery import chip_of_service  # late: it loads the simulator

    return chip_of_service()


device_chip_option = click.option(
    "--chip",
    metavar="NAME|FILE",
    callback=_of_service,
    show_default="the device service's, or edge",
    help="A preset, or a .toml or .py chip file; an error if PAGODA_DEVICE names a service with "
    "another chip.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on the last line."
)
