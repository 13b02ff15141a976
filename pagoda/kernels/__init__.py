"""The kernel library as tile IR kernels: matrix products, convolution, attention, what they share.

In: shapes, dtypes and attributes of a library call, and blocks chosen for a chip. Out: `Kernel`s
and the views and scalars to call them with. Imports `compiler` and `isa`.
"""
