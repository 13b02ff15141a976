"""The whole stack in one file, from the chip to PyTorch. Read this first, from top to bottom.

One small computation runs all the way through: a layer of a neural network, y = relu(x w^T), four
rows of four numbers. Every storey states it in its own words, on the same small chip, and every
storey must arrive at the same y.

    a chip                  plain data: an array of 4 x 4 multipliers, 64 KiB of SRAM, ...
    RV32 instructions       the control core: an ordinary, small RISC-V processor
    tensor commands         what the control core asks the engines to do, by storing words
    a kernel                the layer in Python; compiled to the same kind of program by LLVM
    a launch on a device    memory, tensors, faults: the operating system's part
    PyTorch                 torch.compile with backend="pagoda": nobody wrote a kernel

Two machines run programs: the *definition*, which is the contract in slow and plain Python, and the
*simulator*, compiled and fast. They agree on every bit and on every cycle; so must any hardware.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.language import (
    Tensor,
    TensorType,
    dot,
    full,
    kernel,
    load,
    maximum,
    store,
    tiles,
    zeros,
)
from pagoda.compiler.link import (
    TensorArgument,
    argument_words,
    launch_arguments,
    link,
    pack_records,
)
from pagoda.compiler.stages import stage_text
from pagoda.isa import COMMANDS, PRESETS, RV32, Definition, DType, FaultKind, Launch, Program, Slot
from pagoda.isa.commands import ACC_BIT, CONTROL, SCALAR, encode
from pagoda.pytorch import device as torch_device
from pagoda.pytorch.chip import use_chip
from pagoda.runtime import Device, DeviceFault
from pagoda.sim import Simulator

bfloat16 = ml_dtypes.bfloat16

# The layer: small whole numbers, which bf16 and every sum of theirs hold exactly.
X = np.arange(-8, 8).reshape(4, 4).astype(bfloat16)
W = np.array([[1, 0, 2, -1], [3, 1, 0, 0], [-2, 0, 1, 1], [0, -1, -1, 2]], bfloat16)
Y = np.maximum(X.astype(np.float32) @ W.astype(np.float32).T, 0).astype(bfloat16)


# 1. The chip -------------------------------------------------------------------------------------

CHIP = PRESETS["tiny"]


def test_a_chip_is_plain_data():
    assert (CHIP.cores, CHIP.rows, CHIP.cols, CHIP.sram_bytes) == (1, 4, 4, 64 * 1024)
    assert CHIP.peak_macs_per_second == 16 * CHIP.clock_hz


# 2. The control core -----------------------------------------------------------------------------


def run(words, memory=b"", nbytes=0):
    """Run instruction words on both machines; the result, and the DRAM after it.

    memory: what DRAM holds from address 0 on. The program may touch `nbytes` of it, as slot 0.
    """
    code = b"".join(word.to_bytes(4, "little") for word in words)
    launch = Launch(Program("by hand", code), slots=(Slot(0, nbytes),))
    outcomes = []
    for machine in (Definition(CHIP, trace=True), Simulator(CHIP, trace=True)):
        machine.write(0, memory)
        machine.start(launch)
        result = machine.wait()
        assert result.fault is None, result.fault.describe()
        outcomes.append((result.cycles, result.trace.tolist(), machine.read(0, nbytes)))
    assert outcomes[0] == outcomes[1]  # definition = simulator: cycles, every command's times, bits
    return result, machine.read(0, nbytes)


PORT = 5  # register x5 will hold the address of the command port


def test_four_instructions():
    """The smallest program: it stores a word to the command port, and that word means `exit`."""
    words = [
        0x400002B7,  # lui  x5, 0x40000     x5 = 0x40000000, the command port
        0x00700313,  # addi x6, x0, 7       nobody needs it
        0x0262C3B3,  # div  x7, x5, x6      nor this; it takes 40 cycles
        0x0002A423,  # sw   x0, 8(x5)       word 2 of the port: exit
    ]
    assert words == [
        RV32.encode("lui", rd=PORT, uimm=0x40000),
        RV32.encode("addi", rd=6, rs1=0, imm=7),
        RV32.encode("div", rd=7, rs1=PORT, rs2=6),
        RV32.encode("sw", rs2=0, rs1=PORT, imm=4 * CONTROL["exit"]),
    ]
    result, _ = run(words)
    assert result.counters.instructions == 4
    shorter, _ = run(words[:2] + words[3:])
    assert result.cycles - shorter.cycles == 40


# 3. Tensor commands ------------------------------------------------------------------------------


def store_word(bank, word, value):
    """The instructions that store a 32-bit value to a word of the command port."""
    low = (value & 0xFFF ^ 0x800) - 0x800  # what addi can add: -2048 ... 2047
    return [
        RV32.encode("lui", rd=6, uimm=(value - low) >> 12 & 0xFFFFF),
        RV32.encode("addi", rd=6, rs1=6, imm=low),
        RV32.encode("sw", rs2=6, rs1=PORT, imm=64 * bank + 4 * word),
    ]


def command(name, **fields):
    """Every command has a bank of words: one store per field, and the store to word 0 issues it."""
    stores = [store_word(COMMANDS[name].bank, *each) for each in encode(name, **fields)]
    return [instruction for each in stores for instruction in each]


START = [RV32.encode("lui", rd=PORT, uimm=0x40000)]
EXIT = store_word(0, CONTROL["exit"], 0)


def test_one_command():
    """`iota` counts in SRAM, `store` takes the tile to DRAM: the engines do it, not the core."""
    tile = dict(rows=2, cols=3)
    words = [
        *START,
        *command("iota", dst=0, dst_stride=12, **tile, start=10, row_step=10, col_step=1),
        *command(
            "store", mem=DType.I32, local=DType.I32, slot=0, offset=0, address=0, **tile,
            planes=1, mem_row_stride=12, row_stride=12,
        ),
        *EXIT,
    ]  # fmt: skip
    _, dram = run(words, nbytes=24)
    assert np.frombuffer(dram, np.int32).tolist() == [10, 11, 12, 20, 21, 22]


def test_the_layer_in_five_commands():
    """x and w to SRAM, their product to the accumulators, relu back to SRAM, and y to DRAM.

    Nobody waits for anybody here: the chip sees that the product reads what a load still writes,
    and holds it back. What a program means is its commands one after another.
    """
    x_at, w_at, y_at = 0, 32, 64  # in slot 0 of DRAM; 4 x 4 elements of 2 bytes are 32 bytes
    bank = CHIP.bank_bytes("sram")
    x, w, y = 0, bank, 2 * bank  # in SRAM: each its own bank, so that nothing shares a port
    tile = dict(
        mem=DType.BF16, local=DType.BF16, slot=0, rows=4, cols=4, planes=1,
        mem_row_stride=8, row_stride=8,
    )  # fmt: skip
    words = [
        *START,
        *command("load", offset=x_at, address=x, **tile),
        *command("load", offset=w_at, address=w, **tile),
        *command(  # w is stored [n, k], as nn.Linear does
            "matmul", a=x, m0=4, m0_stride=8, m1=1, m2=1, k_inner=4, k_outer=1,
            b=w, b_stride=8, n=4, transpose_b=1, acc=0, acc_stride=16,
        ),
        *command(  # dst = mov(fmax(acc, 0.0)), rounded to bf16
            "vector", f1=5, f2=0, a=ACC_BIT, a_stride=16, a_dtype=DType.F32,
            b_kind=SCALAR, b=0, b_dtype=DType.F32, c_kind=SCALAR, c_dtype=DType.F32,
            dst=y, dst_stride=8, dst_dtype=DType.BF16, rows=4, cols=4,
        ),
        *command("store", offset=y_at, address=y, **tile),
        *EXIT,
    ]  # fmt: skip
    result, dram = run(words, X.tobytes() + W.tobytes() + bytes(32), nbytes=96)
    assert dram[y_at:] == Y.tobytes()
    assert result.counters.macs == 4 * 4 * 4
    assert result.counters.commands == 5


# 4. A kernel -------------------------------------------------------------------------------------


@kernel
def layer(y: Tensor, x: Tensor, w: Tensor, *, ROWS):
    """y[m, n] = relu(x[m, k] w[n, k]^T), ROWS rows of x at a time; w stays in SRAM."""
    weights = load(w[:, :])
    for i in tiles(x.size(0), ROWS):
        sums = zeros(i, full(w.size(1)))
        sums += dot(load(x[i, :]), weights)
        store(y[i, :], maximum(sums, 0.0))


ROWS_OF_FOUR = TensorType(DType.BF16, (None, 4), (8, 2))  # any number of rows, given by the call
TRANSPOSED = TensorType(DType.BF16, (4, 4), (2, 8))  # w^T is w read the other way round
LAYER = layer.build(y=ROWS_OF_FOUR, x=ROWS_OF_FOUR, w=TRANSPOSED, ROWS=4)


def test_a_kernel_on_its_way_to_code():
    """Each stage of the compiler is text that one can read: `pagoda dump` prints them."""
    stages = {name: stage_text(LAYER, CHIP, name) for name in ("ir", "commands", "llvm", "asm")}
    assert "acc = dot x_2, transpose w_2" in stages["ir"]  # tiles; names are the kernel's where
    assert "y_2 = fmax(acc, 0.0)" in stages["ir"]  # it gives any
    assert "vector f1=fmax f2=mov" in stages["commands"]  # fields are set before the loop, or in it
    assert 'define void @"kernel"' in stages["llvm"]
    assert "lui\ta1, 262144" in stages["asm"]  # 0x40000: the command port again


# 5. A launch on a device -------------------------------------------------------------------------


class Layer:
    """The kernel as a program on a device: how a compiled region of a model runs, too."""

    def __init__(self, machine=None):
        self.device = Device(CHIP, machine)
        linked = link("layer", [(LAYER.name, compile_kernel(LAYER, CHIP).blob())], CHIP)
        self.program, self.entry = linked.program, linked.entries[0]

    def __call__(self, x, w, rows=None):
        """y; `rows` lies about how many rows x has."""
        place = self.device.place
        y, rows = np.zeros_like(x), len(x) if rows is None else rows
        addresses = {"y": place(y), "x": place(x), "w": place(w)}
        slots = [Slot(address, 32 * len(x) // 4) for address in addresses.values()]
        arguments = {
            "y": TensorArgument(1, 0, (rows, 4), (8, 2)),
            "x": TensorArgument(2, 0, (rows, 4), (8, 2)),
            "w": TensorArgument(3, 0, (4, 4), (2, 8)),
        }
        calls = [(self.entry, argument_words(LAYER, arguments))]  # a launch may hold many calls
        records = pack_records(calls)
        slots.insert(0, Slot(place(records), records.nbytes, writable=False))
        self.result = self.device.launch(self.program, launch_arguments(0, 0, calls), slots)
        return self.device.array(addresses["y"], y.shape, y.dtype).copy()


def test_a_launch_on_a_device():
    on_simulator, on_definition = Layer(), Layer(Definition(CHIP))
    for run_layer in (on_simulator, on_definition):
        assert run_layer(X, W).tobytes() == Y.tobytes()
    assert on_simulator.result.cycles == on_definition.result.cycles
    assert on_simulator.device.counters.macs == 64


def test_a_kernel_cannot_leave_its_tensors():
    """The chip checks each access against the launch's slots; the fault names the kernel's line."""
    with pytest.raises(DeviceFault, match=r"kernel 'layer', .*test_tiny\.py") as stopped:
        Layer()(X, W, rows=8)
    assert stopped.value.fault.kind == FaultKind.OUT_OF_SLOT


# 6. PyTorch --------------------------------------------------------------------------------------


@pytest.fixture
def pagoda_device():
    """The torch device "pagoda" on a chip of its own; afterwards as it was before."""
    before = torch_device.state.executor, torch_device.state.allocator
    yield use_chip(CHIP)
    torch_device.state.executor, torch_device.state.allocator = before


def test_pytorch(pagoda_device):
    """Inductor fuses, our backend makes one program of it, and the chip computes what torch does.

    The sizes are larger than the array, and odd: what does not fit is done in parts.
    """

    def network(x, w, bias):
        hidden = torch.relu(torch.nn.functional.linear(x, w))
        return hidden * 2 + bias

    torch.manual_seed(0)
    x, w, bias = (torch.randint(-3, 4, size).bfloat16() for size in ((7, 9), (5, 9), (5,)))
    on_chip = torch.compile(network, backend="pagoda")
    torch.pagoda.reset_fallbacks()
    y = on_chip(x.to("pagoda"), w.to("pagoda"), bias.to("pagoda"))
    assert torch.equal(y.cpu(), network(x, w, bias))
    assert pagoda_device.counters.macs == 7 * 9 * 5  # the chip's own count: the host did none
    assert torch.pagoda.fallbacks() == {}
