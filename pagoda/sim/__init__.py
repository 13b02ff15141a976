"""The fast simulator: values and cycles of the contract, in code compiled by numba.

Enters: a `Chip` and launches. Leaves: `Simulator`, a `Machine` whose bits, cycles, faults and
traces equal the definition's. May import: pagoda.isa (encodings, durations, plain data; never a
meaning), numpy, numba, llvmlite, platformdirs.

In reading order: `layout` (a core's state), `jit` (compilation, cache, raw memory), `decode` and
`core` (control core, command port), `entry` (checks, ranges, durations), `window` (the window
rule), `convert`, `transfer`, `functions`, `vector`, `reduce`, `matmul`, `microkernel`, `numbers`
(values), `checking` and `races` (checking mode), `machine` (the launch).
"""

from pagoda.sim.machine import Simulator

__all__ = ["Simulator"]
