"""PyTorch on the chip: the device "pagoda" and the torch.compile backend "pagoda".

Enters: PyTorch models. Leaves: `pagoda.compiler.region.Region`s, given to an executor.
May import: torch and every storey but `chip`.

Importing this package registers the device with torch, for the whole process; that is quick.
Inductor is imported by `use`, or when something is first compiled.
"""

from pagoda.pytorch import library
from pagoda.pytorch.device import use

__all__ = ["autoload", "library", "use"]


def autoload() -> None:
    """What torch calls at its own import; importing this package has done the work."""
