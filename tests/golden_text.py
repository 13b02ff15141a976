"""Golden files: PAGODA_UPDATE_GOLDEN=1 writes them anew; read the difference before committing."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check_golden(name: str, text: str) -> None:
    """The text equals the file `name`, or becomes it when asked to."""
    path = FOLDER / name
    if os.environ.get("PAGODA_UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no golden file {path}; make it with PAGODA_UPDATE_GOLDEN=1"
    assert text == path.read_text(), f"{name} changed; if it should, PAGODA_UPDATE_GOLDEN=1"
