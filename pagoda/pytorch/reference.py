"""What torch on the host takes for the same work: the denominators of the benchmarks."""

from collections.abc import Callable

import torch


def product(size: int) -> Callable[[], torch.Tensor]:
    """An fp32 product of two size x size matrices on one host thread, warmed up."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))

    def run() -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return torch.mm(a, b.T)
        finally:
            torch.set_num_threads(before)

    run()
    return run
