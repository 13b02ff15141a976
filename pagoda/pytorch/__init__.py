"""PyTorch on the chip: the device "pagoda" and the torch.compile backend "pagoda".

Enters: PyTorch models. Leaves: `pagoda.compiler.region.Region`s, given to an executor.
May import: torch and every storey but `chip`.

Importing this package registers the device with torch, for the whole process; that is quick. An
installed Pagoda is imported by torch itself (`pagoda.autoload`). The first tensor opens the chip,
`edge` unless `pagoda.use_chip` was called; Inductor is imported then too.
"""

from pagoda.pytorch import int8, library
from pagoda.pytorch.device import use

__all__ = ["int8", "library", "use"]
