"""The kernel library: matrix products, attention and what they share, as tile IR kernels.

In: shapes, dtypes and attributes of a library call, and blocks chosen for a chip. Out: `Kernel`s
and the views and scalars to call them with. Imports `compiler` and `isa`.
"""
