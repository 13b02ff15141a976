"""The documents name what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_reading_lists_every_file():
    package = ROOT / "pagoda"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    rows = (ROOT / "docs/reading.md").read_text()
    listed = re.findall(r"^\| `([a-z_0-9/]+\.py)`", rows, re.MULTILINE)
    assert len(listed) == len(set(listed))
    # What a folder's own file says is its storey's heading; the command's is worth reading.
    wanted = {name for name in files if not name.endswith("__init__.py")} | {"cli/__init__.py"}
    assert set(listed) == wanted - {"__main__.py"}
