"""Block sizes fit every chip, and simplification keeps a nest's meaning."""

import numpy as np
import pytest
from nest_support import execute, random_array
from test_nest_lowering import rms_norm, softmax

from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Symbol, Var
from pagoda.compiler.loop_nest import Builder
from pagoda.compiler.nest_blocks import choose_blocks
from pagoda.compiler.nest_lowering import Blocks, lower
from pagoda.compiler.nest_simplify import simplify, simplify_index
from pagoda.isa.chip import PRESETS

I0, I1 = Var(0), Var(1)


@pytest.mark.parametrize("nest", [rms_norm(576, "bfloat16"), softmax(Symbol("n"))])
def test_every_preset_has_blocks_and_the_same_bits(nest):
    symbols = [3, 576][: len(nest.symbols)]
    arrays = [random_array(p.dtype, 3 * 576, k) for k, p in enumerate(nest.params)]
    hints = {"n0": 512, "n1": 2048}
    found = set()
    for chip in PRESETS.values():
        lowered = lower(nest, choose_blocks(nest, hints, chip), hints)
        compile_kernel(lowered.kernel, chip)
        found.add(execute(lowered, arrays, symbols)[-1].tobytes())
    assert len(found) == 1


def test_a_row_stays_in_sram_where_it_fits():
    assert choose_blocks(rms_norm(576), {"n0": 512}, PRESETS["edge"]) == Blocks(16, 576)
    wide = softmax(Const(200_000))
    assert choose_blocks(wide, {"n0": 512}, PRESETS["edge"]).cols < 200_000


def test_columns_of_a_tile_are_transferred_in_long_runs():
    """The sum over the rows of a matrix: its tiles are transposed, 16 columns are no 16 loads."""
    b = Builder([Const(16), Const(6272)], 1)
    x = b.load("x", "float32", I1 * 16 + I0)
    b.store("y", "float32", I0, b.reduce("sum", x))
    nest, _, _ = b.build()
    assert choose_blocks(nest, {}, PRESETS["edge"]).rows == 16
    assert choose_blocks(nest, {}, PRESETS["tiny"]).rows == 16


def test_words_name_slots_offsets_and_symbols():
    lowered = lower(softmax(Symbol("n")), Blocks(4, 64))
    assert [(w.what, w.index) for w in lowered.words] == [
        ("slot", 0), ("offset", 0), ("slot", 1), ("offset", 1), ("symbol", 0), ("symbol", 1),
    ]  # fmt: skip
    assert [what for _, what, _ in lowered.kernel.words()] == [
        "slot", "offset", "slot", "offset", "scalar", "scalar",
    ]  # fmt: skip


def test_index_simplification():
    sizes = (Symbol("n"), Const(8), Const(3))
    index = (I0 * 24 + I1 * 3 + Var(2)) // 3
    assert simplify_index(index, sizes) == I0 * 8 + I1
    assert simplify_index((I0 * 24 + I1) % 8, sizes) == I1
    assert simplify_index((I1 + 1) // 8, sizes) == (I1 + 1) // 8
    assert simplify_index((I1 * Symbol("n") + I0) // Symbol("n"), sizes) == I1


def test_a_divided_dimension_splits_and_single_ones_vanish():
    b = Builder([Const(1), Symbol("s") * 4])
    x = b.load("x", "float32", I0 * 9 + I1 % 4 * 7 + I1 // 4)
    b.store("y", "float32", I1, x)
    assert str(simplify(b.build()[0])) == (
        "loop_nest(p0: read float32, p1: write float32; n0)\n"
        "for i0 in n0, i1 in 4:\n"
        "  %0 = load p0[i0 + 7*i1] : float32\n"
        "  store p1[4*i0 + i1] = %0"
    )


def test_reading_back_another_element_is_refused():
    b = Builder([Symbol("s")])
    b.store("x", "float32", I0, b.constant(1.0, "float32"))
    b.store("y", "float32", I0, b.load("x", "float32", I0 + 1))
    with pytest.raises(CompileError) as caught:
        simplify(b.build()[0])
    assert str(caught.value) == (
        "loop nest: load p0[i0 + 1]: a nest reads back only the very element it stored, but it "
        "stored p0[i0] before; run the two parts as separate nests"
    )


def test_accumulation_into_int64_is_refused():
    b = Builder([Symbol("s")])
    b.store("x", "int64", I0, b.load("y", "int64", I0), "add")
    with pytest.raises(CompileError) as caught:
        lower(b.build()[0], Blocks(1, 64))
    assert str(caught.value) == (
        "loop nest: accumulation into p1: an accumulating store adds to float32, bfloat16 or "
        "int32, but the type is int64; accumulate in int32 and convert afterwards"
    )


def test_read_back_is_the_stored_value():
    b = Builder([Symbol("s")])
    b.store("x", "bfloat16", I0, b.load("y", "float32", I0))
    b.store("z", "float32", I0, b.load("x", "bfloat16", I0))
    nest, names, _ = b.build()
    arrays = {"y": random_array("float32", 5), "z": np.zeros(5, np.float32)}
    arrays["x"] = np.zeros(5, np.uint16)
    found = dict(
        zip(names, execute(lower(nest, Blocks(1, 64)), [arrays[n] for n in names], [5]),
            strict=True)
    )  # fmt: skip
    assert (found["z"].view(np.uint32) >> 16 == found["x"]).all()
