"""The compiler: kernels and loop nests in, RV32 programs out.

What enters: kernel-language functions (`language`), loop nests (`loop_nest`), or tile IR built by
hand (`builder`), and a `Chip`. What leaves: position-independent code per kernel, linked into an
`isa.Program` (`link`), with the call list it runs from.
May import: isa, numpy, llvmlite, pyelftools.

Reading order, from a kernel to its code:

    errors, scalar, tile_ir, builder      what a kernel is
    schedule, pipeline, allocate          vector commands, loads ahead, where tiles lie
    command_ir, lower, fields             commands and their field registers
    codegen, link                         LLVM, RV32 code, programs
    compile, cache, stages                the passes in order; kept results; `pagoda dump`
    language, interpret, values, builtin_tiles, builtin      the kernel language
    cost                                  block sizes from the contract's durations
"""
