"""PyTorch on the chip: the device "pagoda" and the torch.compile backend "pagoda".

Enters: PyTorch models. Leaves: `pagoda.compiler.region.Region`s, given to an executor.
May import: torch and every storey but `chip`.

Importing this package registers the device with torch, for the whole process.
"""

from pagoda.pytorch import inductor, library
from pagoda.pytorch.device import use

__all__ = ["inductor", "library", "use"]
