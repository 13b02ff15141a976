"""Scalars, the builder, and where tiles are placed."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.compiler.allocate import allocate
from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError, Location
from pagoda.compiler.scalar import (
    OPERATORS,
    CoreId,
    Int,
    Size,
    Variable,
    binary,
    ceildiv,
    maximum,
    minimum,
    select,
    substitute,
    wrap,
)
from pagoda.compiler.schedule import pack_elementwise
from pagoda.compiler.tile_ir import Read, apply, splat
from pagoda.isa.chip import PRESETS
from pagoda.isa.numbers import DType

EDGE, TINY = PRESETS["edge"], PRESETS["tiny"]


def test_constants_fold():
    i = Variable("i")
    assert Int(3) * 4 + 5 == Int(17)
    assert (i + 3) + 4 == i + 7
    assert (i * 2) * 3 == i * 6
    assert i + 0 == i and i * 1 == i and i // 1 == i and i - i == Int(0)
    assert 0 * i == Int(0) and i % 1 == Int(0)
    assert i.eq(3).eq(0) == i.ne(3)
    assert i.lt(3).ne(0) == i.lt(3)
    assert minimum(i, i) == i and maximum(2, 5) == Int(5)
    assert select(1, i, 7) == i and select(0, i, 7) == Int(7)
    assert Int(-7) // 2 == Int(-4) and Int(-7) % 2 == Int(1)
    assert ceildiv(10, 4) == Int(3)


@given(st.sampled_from(OPERATORS), st.integers(-(2**31), 2**31 - 1), st.integers(-9, 9))
def test_folding_agrees_with_substitution(op, left, right):
    """An expression folded as it is built equals the same one with its leaves put in later."""
    shape = binary(op, Variable("x"), Variable("y"))
    late = substitute(shape, {Variable("x"): Int(left), Variable("y"): Int(right)})
    assert late == binary(op, left, right)
    half = substitute(binary(op, Variable("x"), right), {Variable("x"): Int(left)})
    assert half == late


def test_wrap():
    assert wrap(2**31) == -(2**31) and wrap(-1) == -1 and wrap(2**32 + 5) == 5


def test_variables():
    value = Variable("i") * Size("x", 0) + CoreId() + Variable("j")
    assert value.variables() == {"i", "j"}
    assert str(value) == "(((i * x.size[0]) + core_id) + j)"


def row_sum():
    """The builder's own example, as a kernel with line numbers."""
    b = KernelBuilder("row_sum", Location("row_sum.py", 1))
    x = b.tensor("x", DType.BF16, 2)
    y = b.tensor("y", DType.F32, 1, strides=(4,))
    rows, cols = x.size(0), x.size(1)
    with b.loop("i", CoreId() * 16, rows, 16) as i:
        b.location = Location("row_sum.py", 2)
        r = b.let("r", minimum(16, rows - i))
        state = b.tile(DType.F32, 16, 64, name="state")
        with b.loop("j", 0, cols, 256) as j:
            b.location = Location("row_sum.py", 3)
            c = b.let("c", minimum(256, cols - j))
            chunk = b.tile(DType.BF16, 16, 256, name="chunk")
            b.load(chunk, x.at(i, j), r, c)
            b.reduce("fsum", state, chunk, r, c, first=j.eq(0), start=j)
        b.location = Location("row_sum.py", 4)
        total = b.tile(DType.F32, 16, 1, name="total")
        b.finish("fsum", total, state, r)
        b.store(y.at(i, rows=0), total, r, 1)
    return b.build()


def test_argument_words():
    kernel = row_sum()
    assert kernel.words() == (
        ("x", "slot", 0), ("x", "offset", 0), ("x", "size", 0), ("x", "size", 1),
        ("x", "stride", 0), ("x", "stride", 1),
        ("y", "slot", 0), ("y", "offset", 0), ("y", "size", 0),
    )  # fmt: skip


def test_apply_checks_classes():
    b = KernelBuilder("k")
    x, n = b.tile(DType.BF16, 1, 1), b.tile(DType.I32, 1, 1)
    with pytest.raises(TypeError, match=r"^fadd wants \(float, float\), not \(float, int\)$"):
        apply("fadd", Read(x.view()), Read(n.view()))
    with pytest.raises(TypeError, match=r"^select wants \(int, T, T\), not \(float, float, int\)$"):
        apply("select", Read(x.view()), Read(x.view()), Read(n.view()))
    with pytest.raises(TypeError, match="^no element-wise function 'tanh'$"):
        apply("tanh", Read(x.view()))


def test_loaded_tiles_rotate_and_states_do_not():
    placements = {t.name: p for t, p in allocate(row_sum(), EDGE).items()}
    assert placements["chunk"].buffers == 4
    assert placements["state"].buffers == 1
    assert placements["total"].buffers == 2


def test_matmul_operands_lie_in_different_banks():
    b = KernelBuilder("k")
    x = b.tensor("x", DType.BF16, 2)
    with b.loop("i", 0, x.size(0)) as i:
        a, w = b.tile(DType.BF16, 16, 128), b.tile(DType.BF16, 64, 128)
        acc = b.tile(DType.F32, 16, 64, memory="acc")
        b.load(a, x.at(i, 0))
        b.load(w, x.at(i, 0))
        b.dot(acc, a, w, 16, 64, 128, transpose_b=True)
        b.store(x.at(i, 0), acc)
    for chip in (TINY, EDGE):
        placements = allocate(b.build(), chip)
        bank = chip.bank_bytes("sram")
        used = [range(placements[t].address // bank, -(-placements[t].end // bank)) for t in (a, w)]
        assert not set(used[0]) & set(used[1]), chip.name
        halves = placements[acc]
        assert halves.buffers == 2 and halves.stride % chip.bank_bytes("acc") == 0


def test_tiles_alive_together_never_overlap():
    b = KernelBuilder("k")
    x = b.tensor("x", DType.F32, 2)
    kept = b.tile(DType.F32, 16, 64)
    b.load(kept, x.at(0, 0))
    with b.loop("i", 0, 4) as i:
        first, second = b.tile(DType.F32, 16, 64), b.tile(DType.F32, 16, 64)
        b.load(first, x.at(i, 0))
        b.elementwise(second, apply("fadd", Read(first.view()), Read(kept.view())))
        b.store(x.at(i, 0), second)
    kernel = pack_elementwise(b.build())
    placements = allocate(kernel, TINY)
    spans = sorted((p.address, p.end) for p in placements.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_fewer_buffers_where_memory_is_short():
    b = KernelBuilder("k")
    x = b.tensor("x", DType.F32, 2)
    with b.loop("i", 0, x.size(0)) as i:
        large, small = b.tile(DType.F32, 64, 64), b.tile(DType.F32, 64, 64)
        b.load(large, x.at(i, 0))
        b.elementwise(small, apply("fneg", Read(large.view())))
        b.store(x.at(i, 0), small)
    placements = allocate(pack_elementwise(b.build()), TINY)
    assert {placements[large].buffers, placements[small].buffers} <= {1, 2}
    assert sum(p.buffers for p in placements.values()) == 4


def test_a_kernel_that_does_not_fit():
    b = KernelBuilder("big", Location("big.py", 7))
    x = b.tensor("x", DType.F32, 2)
    tile = b.tile(DType.F32, 512, 64, name="panel")
    b.load(tile, x.at(0, 0))
    message = (
        "big.py:7: kernel big: the tiles alive at one time must fit the 64512 bytes of SRAM it may "
        "use, but they need 131072 bytes (panel 512x64 F32 = 131072); choose smaller blocks, or a "
        "chip with more SRAM"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        compile_kernel(b.build(), TINY)


def test_a_tile_used_outside_its_body():
    b = KernelBuilder("k")
    x = b.tensor("x", DType.F32, 2)
    b.location = Location("k.py", 3)
    tile = b.tile(DType.F32, 1, 1, name="lost")
    kernel = b.build()
    b = KernelBuilder("k")
    b.tensor("x", DType.F32, 2)
    b.location = Location("k.py", 4)
    b.load(tile, x.at(0, 0))
    assert kernel.body[0].tile == tile
    message = (
        "k.py:4: tile lost: a tile must be declared before it is used, but no declaration precedes "
        "this statement in its body; declare the tile before the loop or branch"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        compile_kernel(b.build(), TINY)


@pytest.mark.parametrize(
    ("emit", "message"),
    [
        (
            lambda b, x, t: b.load(t["i32"], x.at(0, 0)),
            ("tensor x and tile i32: a transfer converts float to float or integer to integer, but "
            "they are F32 and I32; give the tile a dtype of the tensor's class and convert with "
            "i2f or f2i"),
        ),
        (
            lambda b, x, t: b.load(t["f32"], x.at(0, 0), 17, 1),
            ("tile f32: an operation stays within its 16 rows, but this one reaches 17; declare a "
            "larger tile or use smaller extents"),
        ),
        (
            lambda b, x, t: b.dot(t["acc"], t["f32"], t["f32"], 16, 16, 16),
            ("dot: BF16 x BF16 accumulates in F32 and I8 x I8 in I32, but its tiles are F32 x F32 "
            "in F32; load or convert the operands to one of these"),
        ),
        (
            lambda b, x, t: b.dot(t["f32"], t["bf16"], t["bf16"], 16, 16, 16),
            ("dot: the operands are in SRAM and the result in ACC, but they are in sram, sram and "
            "sram; declare the tiles in those memories"),
        ),
        (
            lambda b, x, t: b.reduce("fsum", t["f32"], t["bf16"]),
            "reduction fsum: the state has 64 columns, but tile f32 has 16; declare it rows x 64",
        ),
        (
            lambda b, x, t: b.gather(t["f32"], x.at(0, 0), t["acc"]),
            ("index tile acc: row indices are I32 in SRAM, but tile acc is F32 in ACC; load or "
            "convert the indices into an I32 SRAM tile"),
        ),
        (
            lambda b, x, t: b.elementwise(t["i32"], splat(1), 4, 20),
            ("tile i32: an operation stays within its 16 columns, but this one reaches 20; declare "
            "a larger tile or use smaller extents"),
        ),
    ],
)
def test_operations_no_command_can_do(emit, message):
    b = KernelBuilder("k")
    x = b.tensor("x", DType.F32, 2)
    tiles = {d.name.lower(): b.tile(d, 16, 16, name=d.name.lower())
             for d in (DType.F32, DType.I32, DType.BF16)}  # fmt: skip
    tiles["acc"] = b.tile(DType.F32, 16, 16, name="acc", memory="acc")
    b.location = Location("k.py", 9, 5)
    emit(b, x, tiles)
    with pytest.raises(CompileError, match=f"^{re.escape('k.py:9:5: ' + message)}$"):
        compile_kernel(b.build(), TINY)


def test_a_matrix_type_the_chip_lacks():
    b = KernelBuilder("k", Location("k.py", 1))
    a, acc = b.tile(DType.BF16, 8, 8), b.tile(DType.F32, 8, 8, memory="acc")
    b.location = Location("k.py", 5)
    b.dot(acc, a, a, 8, 8, 8)
    message = (
        "k.py:5: dot: the matrix engine of chip tiny8 multiplies int8, but the operands are bf16; "
        "convert them, or use another chip"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        compile_kernel(b.build(), PRESETS["tiny8"])


def test_more_arguments_than_a_record_holds():
    b = KernelBuilder("wide", Location("k.py", 1))
    for number in range(22):
        b.tensor(f"t{number}", DType.F32, 2)
    message = (
        "k.py:1: kernel wide: a call has at most 126 argument words, but its 22 tensors and 0 "
        "scalars take 132; fix sizes or strides at compile time, or split the kernel"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        compile_kernel(b.build(), EDGE)
