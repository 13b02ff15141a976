"""The chip as RTL in Amaranth: the same bits and the same cycles as the contract, in gates.

Enters: a `Chip`; a folder to write Verilog to; launches. Leaves: Verilog (`verilog`), a `Machine`
on the Verilated RTL (`machine.RtlMachine`), and what open tools say it costs. May import: isa,
numpy, amaranth, platformdirs, subprocess. Nothing below imports it, and nothing of it is imported
before it is asked for: `pip install "pagoda-stack[chip]"` or `make setup-chip` bring what it needs.
"""
