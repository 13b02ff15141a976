"""The terminal view as text: golden files at two widths, and odd devices."""

import dataclasses
import io

from device_figures import figures
from golden_text import check_golden
from rich.console import Console

from pagoda.cli.device_load import CoreLoad, DeviceLoad, load_between
from pagoda.cli.top_screen import screen


def shown(*devices: DeviceLoad, width: int, problems: tuple[str, ...] = ()) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(screen(devices, problems))
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def test_a_shared_device():
    load = load_between(figures(), figures(later=2.0))
    check_golden("top.132.txt", shown(load, width=132))
    check_golden("top.80.txt", shown(load, width=80))


def test_many_cores_stand_side_by_side():
    load = load_between(figures(), figures(later=2.0))
    many = tuple(CoreLoad(n, n / 31, 100 + n if n % 3 else None) for n in range(32))
    idle = dataclasses.replace(
        load, chip="cloud", cores=many, processes=(), queue=(), problems=(), cycles_per_second=0.0
    )
    text = shown(idle, load, width=120, problems=("the device service on /x is gone",))
    check_golden("top.cloud.txt", text)


def test_names_are_no_markup():
    now = figures()
    now["contexts"][0]["name"] = "[bold]x[/]"
    assert "[bold]x[/]" in shown(load_between(None, now), width=132)
