"""The compiler: kernels and loop nests in, RV32 programs out.

What enters: kernel-language functions (`language`), loop nests (`loop_nest`), or tile IR built by
hand (`builder`), and a `Chip`. What leaves: `isa.Program` and packed call records.
May import: isa, numpy, llvmlite, pyelftools. Reading order: errors, scalar, tile_ir, builder,
schedule, allocate, lower, fields, codegen, link; then language, cost, cache, stages.
"""
