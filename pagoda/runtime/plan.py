"""Where temporaries lie: offsets in one arena, shared by tensors that never live together."""

from collections.abc import Sequence

from pagoda.isa.chip import DRAM_ATOM_BYTES


def plan_arena(tensors: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets of tensors given as (bytes, first use, last use), and the arena's size in bytes.

    Greedy by size (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference",
    2020): the largest first, each at the lowest offset free during its whole life. Offsets are
    multiples of the DRAM atom, so no two tensors share one.
    """
    offsets = [0] * len(tensors)
    placed: list[tuple[int, int, int, int]] = []  # start, end, first, last
    for number in sorted(range(len(tensors)), key=lambda k: (-tensors[k][0], k)):
        nbytes, first, last = tensors[number]
        need = max(-(-nbytes // DRAM_ATOM_BYTES), 1) * DRAM_ATOM_BYTES
        start = 0
        for other in sorted(p for p in placed if p[2] <= last and first <= p[3]):
            if start + need <= other[0]:
                break
            start = max(start, other[1])
        offsets[number] = start
        placed.append((start, start + need, first, last))
    return offsets, max((p[1] for p in placed), default=0)
