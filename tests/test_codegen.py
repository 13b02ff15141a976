"""Tile IR to code that runs: every operation, fields, line table, linking, cache, stages."""

import re
import threading
import warnings
from itertools import pairwise

import numpy as np
import pytest
from compiler_support import bfloat16, run_calls, run_kernel
from golden_text import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tile_ir import row_sum

from pagoda.compiler.builder import KernelBuilder
from pagoda.compiler.cache import Cache
from pagoda.compiler.command_ir import Go, Issue, SetField
from pagoda.compiler.compile import compile_kernel
from pagoda.compiler.errors import CompileError, Location
from pagoda.compiler.fields import hoist_fields
from pagoda.compiler.link import (
    MAX_ARGUMENT_WORDS,
    TensorArgument,
    argument_words,
    launch_arguments,
    link,
    pack_records,
    record_bytes,
)
from pagoda.compiler.pipeline import pipeline
from pagoda.compiler.scalar import (
    CoreCount,
    CoreId,
    Int,
    Variable,
    binary,
    minimum,
    select,
    substitute,
)
from pagoda.compiler.schedule import Reserve, Vector, pack_elementwise
from pagoda.compiler.stages import STAGES, stage_text
from pagoda.compiler.tile_ir import Column, For, If, Let, Read, Row, apply, splat, walk
from pagoda.isa import numbers
from pagoda.isa.accumulation import ReduceOp, finish, initial_state, reduce_row
from pagoda.isa.chip import PRESETS
from pagoda.isa.definition import Definition
from pagoda.isa.numbers import DType
from pagoda.isa.program import Launch, Slot
from pagoda.isa.tables import exp2, rsqrt

EDGE, TINY, CAR = (PRESETS[name] for name in ("edge", "tiny", "car"))
ROW = {"strides": (None, 4)}


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Scalars and control -----------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-9, 9)), min_size=1, max_size=8))
def test_scalar_arithmetic_runs_like_python(pairs):
    """Each operator on run-time values, read back through tiles of one element."""
    operators = ("+", "-", "*", "//", "%", "min", "max", "<", "<=", ">", ">=", "==", "!=")
    b = KernelBuilder("arithmetic")
    pairs_in, out = b.tensor("pairs", DType.I32, 2, **ROW), b.tensor("out", DType.I32, 2, **ROW)
    with b.loop("i", 0, pairs_in.size(0)) as i:
        pair = b.tile(DType.I32, 1, 2)
        b.load(pair, pairs_in.at(i, 0), 1, 2)
        x, y = b.read_word("x", pair), b.read_word("y", pair.view(0, 1))
        y = b.let("y", select(y.eq(0), 3, y))
        result = b.tile(DType.I32, 1, len(operators) + 1)
        for column, op in enumerate(operators):
            b.elementwise(result.view(0, column), splat(binary(op, x, y)), 1, 1)
        b.elementwise(result.view(0, len(operators)), splat(x // 4 + x % 8), 1, 1)
        b.store(out.at(i, 0), result, 1)
    given_pairs = np.array(pairs, np.int32)
    found = np.zeros((len(pairs), len(operators) + 1), np.int32)
    run_kernel(TINY, b.build(), pairs=given_pairs, out=found)
    for (x, y), row in zip(pairs, found.tolist(), strict=True):
        y = y or 3
        assert row == [
            x + y, x - y, x * y, x // y, x % y, min(x, y), max(x, y),
            x < y, x <= y, x > y, x >= y, x == y, x != y, x // 4 + x % 8,
        ]  # fmt: skip


def test_branches_loops_and_rebound_names():
    """Sum of i over odd i minus sum over even i, kept in a name that is bound again."""
    b = KernelBuilder("branches")
    out = b.tensor("out", DType.I32, 2, **ROW)
    n = b.scalar("n")
    total = Variable("total")
    b.emit(Let("total", Int(0)))
    with b.loop("i", 0, n, 3) as i:
        with b.body() as odd:
            b.emit(Let("total", total + i))
        with b.when((i % 2).eq(0), otherwise=odd):
            b.emit(Let("total", total - i))
    tile = b.tile(DType.I32, 1, 1)
    b.elementwise(tile, splat(total))
    b.store(out.at(0, 0), tile)
    found = np.zeros((1, 1), np.int32)
    run_kernel(TINY, b.build(), out=found, n=20)
    assert found[0, 0] == sum(i if i % 2 else -i for i in range(0, 20, 3))


# Tile operations ---------------------------------------------------------------------------------


def binary_kernel(tree, left=DType.F32, right=DType.F32, result=DType.F32):
    """out = tree(x, y) over tiles of 16 x 32, one core's share of the rows."""
    b = KernelBuilder("binary")
    x, y, out = (
        b.tensor(name, dtype, 2) for name, dtype in (("x", left), ("y", right), ("out", result))
    )
    with b.loop("i", CoreId() * 16, x.size(0), CoreCount() * 16) as i, b.loop(
        "j", 0, x.size(1), 32
    ) as j:
        rows, cols = minimum(16, x.size(0) - i), minimum(32, x.size(1) - j)
        s, t, u = b.tile(left, 16, 32), b.tile(right, 16, 32), b.tile(result, 16, 32)
        b.load(s, x.at(i, j), rows, cols)
        b.load(t, y.at(i, j), rows, cols)
        b.elementwise(u, tree(Read(s.view()), Read(t.view())), rows, cols)
        b.store(out.at(i, j), u, rows, cols)
    return b.build()


@pytest.mark.parametrize("chip", [TINY, EDGE, CAR], ids=lambda chip: chip.name)
def test_elementwise_on_every_chip(chip):
    kernel = binary_kernel(
        lambda x, y: apply("fdiv", apply("fadd", apply("fmul", x, y), x), apply("fabs", y))
    )
    x, y = random((37, 70)), random((37, 70), 1)
    out = np.zeros_like(x)
    run_kernel(chip, kernel, x=x, y=y, out=out)
    assert np.array_equal(out, (x * y + x) / np.abs(y))


BINARY = ("fadd", "fsub", "fmul", "fdiv", "fmax", "fmin")
UNARY = ("fneg", "fabs", "exp2", "ffloor", "rsqrt")


@st.composite
def trees(draw, depth=4):
    """A function of (x, y) as (build, evaluate), nested at random."""
    kinds = ("x", "y", "constant", "unary", "binary", "binary", "fma", "where")
    kind = draw(st.sampled_from(kinds))
    if depth == 0 or kind in ("x", "y", "constant"):
        if kind == "constant":
            value = draw(st.sampled_from((0.5, -2.0, 3.25)))
            return (lambda x, y: splat(value)), (lambda x, y: np.float32(value))
        first = kind != "y"
        return (lambda x, y: x if first else y), (lambda x, y: x if first else y)
    if kind == "unary":
        name = draw(st.sampled_from(UNARY))
        build, evaluate = draw(trees(depth=depth - 1))
        return (
            lambda x, y: apply(name, build(x, y)),
            lambda x, y: reference(name)(evaluate(x, y)),
        )
    parts = [draw(trees(depth=depth - 1)) for _ in range(2 if kind == "binary" else 3)]
    if kind == "where":
        return (
            lambda x, y: apply(
                "select",
                apply("flt", parts[0][0](x, y), splat(0.25)),
                *(part[0](x, y) for part in parts[1:]),
            ),
            lambda x, y: np.where(parts[0][1](x, y) < 0.25, parts[1][1](x, y), parts[2][1](x, y)),
        )
    name = "fma" if kind == "fma" else draw(st.sampled_from(BINARY))
    return (
        lambda x, y: apply(name, *(build(x, y) for build, _ in parts)),
        lambda x, y: reference(name)(*(evaluate(x, y) for _, evaluate in parts)),
    )


def reference(name):
    """The definition's function on lanes."""
    named = {"exp2": exp2, "rsqrt": rsqrt, "fma": numbers.ffma, "ffloor": numbers.floor}
    return named.get(name) or getattr(numbers, name)


@settings(max_examples=40)
@given(trees())
def test_packed_trees_compute_what_the_tree_says(tree):
    build, evaluate = tree
    x, y = random((3, 20)), random((3, 20), 1)
    out = np.zeros_like(x)
    run_kernel(TINY, binary_kernel(build), x=x, y=y, out=out)
    expected = np.broadcast_to(np.asarray(evaluate(x, y), np.float32), out.shape)
    assert np.array_equal(out.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


def packed(tree):
    kernel = pack_elementwise(binary_kernel(tree))
    return [(s.f1, s.f2) for s in walk(kernel.body) if isinstance(s, Vector)]


def test_trees_become_pairs():
    a, s = "fadd", "fsub"
    assert packed(lambda x, y: apply(a, apply("fmul", x, y), x)) == [("fmul", a)]
    assert packed(lambda x, y: apply(s, x, apply("fmul", x, y))) == [("fmul", "frsub")]
    assert packed(lambda x, y: apply("flt", x, apply(a, x, y)))[0] == (a, "fgt")
    assert packed(lambda x, y: apply("exp2", apply(s, x, y))) == [(s, "exp2")]
    assert packed(lambda x, y: apply("fma", x, y, x)) == [("fmul", "fma")]
    square = packed(lambda x, y: apply("fmul", apply(a, x, y), apply(a, x, y)))
    assert square == [(a, "mov"), ("fmul", "mov")]  # the common subtree once


def test_temporaries_are_reused():
    def tree(x, y):
        value = x
        for _ in range(20):
            value = apply("fma", value, apply("fma", value, y, x), y)
        return value

    kernel = pack_elementwise(binary_kernel(tree))
    names = {s.destination.tile.name for s in walk(kernel.body) if isinstance(s, Vector)}
    assert len(names) <= 3


def test_broadcast_convert_and_saturate():
    b = KernelBuilder("broadcast")
    x, out = b.tensor("x", DType.I8, 2), b.tensor("out", DType.I8, 2)
    tile, row, column = b.tile(DType.I8, 8, 16), b.tile(DType.I32, 1, 16), b.tile(DType.I32, 8, 1)
    b.load(tile, x.at(0, 0))
    b.iota(row, col_step=3)
    b.iota(column, row_step=10, start=-5)
    tree = apply("iadd", apply("imul", Read(tile.view()), Row(row.view())), Column(column.view()))
    b.elementwise(tile, tree)
    b.store(out.at(0, 0), tile)
    data = np.random.default_rng(0).integers(-20, 20, (8, 16)).astype(np.int8)
    found = np.zeros_like(data)
    run_kernel(TINY, b.build(), x=data, out=found)
    exact = data * (3 * np.arange(16)) + (10 * np.arange(8)[:, None] - 5)
    assert np.array_equal(found, np.clip(exact, -128, 127))


@pytest.mark.parametrize("chip", [TINY, EDGE], ids=lambda chip: chip.name)
def test_row_sum_over_chunks(chip):
    x = random((37, 700)).astype(bfloat16)
    y = np.zeros(37, np.float32)
    run_kernel(chip, row_sum(), x=x, y=y)
    for row, total in zip(x.astype(np.float32), y, strict=True):
        state = reduce_row(ReduceOp.FSUM, initial_state(ReduceOp.FSUM), row, 0)
        assert finish(ReduceOp.FSUM, state).view(np.float32) == total


def test_gather_transpose_scatter():
    b = KernelBuilder("rows")
    table, index = b.tensor("table", DType.BF16, 2), b.tensor("index", DType.I64, 2)
    out = b.tensor("out", DType.F32, 2)
    rows = b.tile(DType.I32, 1, 8)
    b.load(rows, index.at(0, 0), 1, 5)
    picked, turned = b.tile(DType.F32, 8, 16), b.tile(DType.F32, 16, 8)
    b.gather(picked, table.at(0, 2), rows, 5, 9)
    b.transpose(turned, picked, 5, 9)
    b.store(out.at(0, 0), turned, 9, 5)
    b.scatter(out.at(9, 0), picked, rows, 5, 5)
    data = random((20, 11)).astype(bfloat16)
    order = np.array([[3, 0, 17, 4, 19]], np.int64)
    found = np.zeros((40, 5), np.float32)
    run_kernel(TINY, b.build(), table=data, index=order, out=found)
    picked_rows = data[order[0], 2:].astype(np.float32)
    assert np.array_equal(found[:9], picked_rows.T)
    assert np.array_equal(found[9 + order[0]], picked_rows[:, :5])


def test_padding_and_planes():
    b = KernelBuilder("pad")
    x, out = b.tensor("x", DType.F32, 3), b.tensor("out", DType.F32, 2)
    tile = b.tile(DType.F32, 12, 8)
    b.load(tile, x.at(0, 0, 0), 6, 8, 2, pad_rows=(1, 2), pad_cols=(2, 1))
    b.store(out.at(0, 0), tile)
    data, found = random((2, 3, 5)), np.zeros((12, 8), np.float32)
    run_kernel(TINY, b.build(), x=data, out=found)
    assert np.array_equal(found.reshape(2, 6, 8), np.pad(data, ((0, 0), (1, 2), (2, 1))))


# Fields ------------------------------------------------------------------------------------------


def test_invariant_fields_leave_the_loop():
    body = compile_kernel(row_sum(), EDGE).commands
    inner = [s for s in walk(body) if type(s).__name__ == "For"][-1]
    written = [s for s in walk(inner.body) if isinstance(s, SetField)]
    # load: offset, address, cols; reduce: src, cols, start
    assert len(written) == 6
    assert len([s for s in walk(inner.body) if isinstance(s, Go)]) == 2


NAMES = ("i", "j", "k", "m")


@st.composite
def command_bodies(draw, depth=3):
    """Random command IR: commands over a few fields, rebound names, loops, branches."""
    value = st.one_of(
        st.sampled_from(NAMES).map(Variable),
        st.integers(0, 2).map(Int),
        st.tuples(st.sampled_from(NAMES), st.integers(1, 2)).map(lambda t: Variable(t[0]) + t[1]),
    )
    body = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("issue", "issue", "issue", "let", "for", "if")))
        if kind in ("issue", "let") or depth == 0:
            if kind == "let":
                body.append(Let(draw(st.sampled_from(NAMES[2:])), draw(value)))
            else:
                words = tuple((word, draw(value)) for word in (1, 2, 3))
                body.append(Issue(draw(st.integers(1, 2)), words, draw(value)))
        elif kind == "for":
            variable = draw(st.sampled_from(NAMES[:2]))
            stop = draw(st.integers(0, 3).map(Int))
            inside = draw(command_bodies(depth=depth - 1))
            body.append(For(variable, Int(0), stop, Int(1), inside))
        else:
            branches = draw(command_bodies(depth=depth - 1)), draw(command_bodies(depth=depth - 1))
            body.append(If(draw(value), *branches))
    return tuple(body)


def issued(body):
    """Every command with the three fields it sees, in order; and the number of field writes."""
    names, fields, seen, writes = dict.fromkeys(NAMES, 0), {}, [], 0

    def value(scalar):
        return substitute(scalar, {Variable(n): Int(v) for n, v in names.items()}).value

    def run(body):
        nonlocal writes
        for s in body:
            match s:
                case Issue(bank, words, go):
                    fields.update({(bank, word): value(v) for word, v in words})
                    writes += len(words)
                    seen.append((bank, value(go), *(fields[bank, w] for w in (1, 2, 3))))
                case SetField(bank, word, new):
                    fields[bank, word] = value(new)
                    writes += 1
                case Go(bank, go):
                    seen.append((bank, value(go), *(fields[bank, w] for w in (1, 2, 3))))
                case Let(name, new):
                    names[name] = value(new)
                case If(condition, then, otherwise):
                    run(then if value(condition) else otherwise)
                case For(variable, start, stop, step, inside):
                    for n in range(value(start), value(stop), value(step)):
                        names[variable] = n
                        run(inside)

    run(body)
    return seen, writes


@settings(max_examples=200)
@given(command_bodies())
def test_hoisting_changes_no_command(body):
    before, after = issued(body), issued(hoist_fields(body))
    assert before[0] == after[0]


# Loads ahead -------------------------------------------------------------------------------------


def doubling_kernel(in_place, ahead, cols=32):
    b = KernelBuilder("doubling")
    x = b.tensor("x", DType.F32, 2)
    out = x if in_place else b.tensor("out", DType.F32, 2)
    with b.loop("i", 0, x.size(0), 4, ahead=ahead) as i:
        rows = b.let("rows", minimum(4, x.size(0) - i))
        with b.loop("j", 0, x.size(1), cols) as j:
            width = b.let("width", minimum(cols, x.size(1) - j))
            tile = b.tile(DType.F32, 4, cols)
            b.load(tile, x.at(i, j), rows, width)
            b.elementwise(tile, apply("fadd", Read(tile.view()), splat(1.0)), rows, width)
            out_tile = b.tile(DType.F32, 4, cols)
            twice = apply("fadd", Read(tile.view()), Read(tile.view()))
            b.elementwise(out_tile, twice, rows, width)
            b.store(out.at(i, j), out_tile, rows, width)
    return b.build()


def loads_only(ahead):
    """Like `doubling_kernel`, but nothing writes the loaded tile: it may be loaded early."""
    b = KernelBuilder("loads_only")
    x, out = b.tensor("x", DType.F32, 2), b.tensor("out", DType.F32, 2)
    with b.loop("i", 0, x.size(0), 4, ahead=ahead) as i:
        rows = b.let("rows", minimum(4, x.size(0) - i))
        with b.loop("j", 0, x.size(1), 32) as j:
            width = b.let("width", minimum(32, x.size(1) - j))
            tile, result = b.tile(DType.F32, 4, 32), b.tile(DType.F32, 4, 32)
            b.load(tile, x.at(i, j), rows, width)
            twice = apply("fadd", Read(tile.view()), Read(tile.view()))
            b.elementwise(result, twice, rows, width)
            b.store(out.at(i, j), result, rows, width)
    return b.build()


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_loads_ahead_change_no_result(ahead):
    """Whatever the distance, tails included; more than fits in SRAM is lowered."""
    x, out = random((11, 70)), np.zeros((11, 70), np.float32)
    run_kernel(TINY, loads_only(ahead), x=x, out=out)
    assert np.array_equal(out, x + x)


def test_which_loads_go_ahead():
    def moved(kernel):
        return [s.tile.name for s in pipeline(kernel, 9).walk() if isinstance(s, Reserve)]

    assert moved(loads_only(2)) == ["t"]
    assert moved(loads_only(0)) == []
    assert moved(doubling_kernel(in_place=False, ahead=2)) == []  # the tile is written again
    assert moved(doubling_kernel(in_place=True, ahead=2)) == []  # the tensor is stored to


def test_loads_that_stay_behind_still_work():
    x = random((11, 70))
    expected = (x + 1) * 2
    run_kernel(TINY, doubling_kernel(in_place=True, ahead=2), x=x)
    assert np.array_equal(x, expected)


# Line table, linking, calls ----------------------------------------------------------------------


def test_every_instruction_has_a_line():
    blob = compile_kernel(row_sum(), EDGE).blob()
    assert {place.line for _, place in blob.lines} == {1, 2, 3, 4}
    assert [offset for offset, _ in blob.lines] == sorted({offset for offset, _ in blob.lines})
    linked = link("program", [("row_sum", blob)], EDGE)
    assert linked.program.line_at(0).kernel == "dispatcher"
    found = linked.program.line_at(linked.entries[0] + len(blob.code) - 4)
    assert (found.kernel, found.file) == ("row_sum", "row_sum.py")


def test_many_calls_in_one_launch():
    """Each call reads what the one before stored; the list is longer than the record area."""
    kernel = binary_kernel(lambda x, y: apply("fadd", x, y))
    x, y = random((5, 40)), np.ones((5, 40), np.float32)
    buffers = [np.zeros_like(x) for _ in range(9)]
    chain = [x, *buffers]
    calls = [(kernel, {"x": a, "y": y, "out": b}) for a, b in pairwise(chain)]
    run_calls(TINY, [*calls, (row_sum(), {"x": x.astype(bfloat16), "y": np.zeros(5, np.float32)})])
    expected = x
    for _ in buffers:
        expected = expected + np.float32(1)
    assert np.array_equal(buffers[-1], expected)


def test_no_calls_at_all():
    assert run_calls(TINY, []).cycles < 400


def test_records():
    words = pack_records([(64, [1, -1]), (128, range(20))])
    assert words.dtype == np.uint32 and len(words) == 16 + 32 + 16
    assert words[:5].tolist() == [64, 128, 1, 0xFFFFFFFF, 0]
    assert words[16:20].tolist() == [128, 64, 0, 1]
    assert words[48] == 0
    assert launch_arguments(7, 640, [(64, [1, -1])]) == (7, 640, 64)
    assert record_bytes(14) == 64 and record_bytes(15) == 128
    message = (
        "call of the kernel at 0x40: a call has at most 126 argument words, but it has 127; fix "
        "sizes or strides at compile time, or split the kernel"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        pack_records([(64, [0] * (MAX_ARGUMENT_WORDS + 1))])


def test_call_arguments_are_checked():
    kernel = row_sum()
    x = TensorArgument(0, 0, (4, 8), (16, 2))
    message = (
        "call of row_sum: y has the strides (4,), but the argument has (8,); compile the kernel "
        "for this layout"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        argument_words(kernel, {"x": x, "y": TensorArgument(1, 0, (4,), (8,))})
    with pytest.raises(CompileError, match="^call of row_sum: y is a tensor of rank 1, but"):
        argument_words(kernel, {"x": x})
    words = argument_words(kernel, {"x": x, "y": TensorArgument(1, 64, (4,), (4,))})
    assert words == (0, 0, 4, 8, 16, 2, 1, 64, 4)


def test_code_must_fit_imem():
    blob = compile_kernel(row_sum(), TINY).blob()
    message = (
        r"^program p: its code fits the 16384 bytes of IMEM of chip tiny, but 60 kernels and the "
        r"dispatcher take \d+ bytes; split the region over several launches$"
    )
    with pytest.raises(CompileError, match=message):
        link("p", [("row_sum", blob)] * 60, TINY)


# Cache and stages --------------------------------------------------------------------------------


def test_cache_returns_what_was_stored(tmp_path):
    cache = Cache(tmp_path / "new")
    key = Cache.key("a", b"bc")
    assert key != Cache.key("ab", b"c")
    assert cache.get(key) is None
    cache.put(key, b"data")
    assert Cache(tmp_path / "new").get(key) == b"data"
    compiled = compile_kernel(row_sum(), EDGE)
    assert compiled.blob(cache) == compiled.blob(cache) == compiled.blob()


def test_damaged_entries_count_as_absent(tmp_path):
    cache = Cache(tmp_path)
    cache.put("ab12", b"data" * 100)
    path = tmp_path / "ab" / "12"
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.get("ab12") is None
    path.write_bytes(b"")
    assert cache.get("ab12") is None


def test_writers_at_the_same_time(tmp_path):
    payload = bytes(200_000)

    def work():
        for number in range(10):
            Cache(tmp_path).put(f"ab{number}", payload)
            assert Cache(tmp_path).get(f"ab{number}") == payload

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.rglob("*"))) == 11  # one folder, no temporary files left


def test_a_cache_that_cannot_be_written_warns_once(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    cache = Cache(blocker / "cache")
    with pytest.warns(RuntimeWarning, match=r"^compile cache .*could not be written .*free some"):
        cache.put("ab12", b"data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("ab12", b"data")
    assert cache.get("ab12") is None


@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage):
    check_golden(f"row_sum.{stage}.txt", stage_text(row_sum(), EDGE, stage))


def test_unknown_stage():
    message = (
        "stage 'hex': the stages are ir, commands, llvm, asm, but it is none of them; name one of "
        "those"
    )
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        stage_text(row_sum(), EDGE, "hex")


def test_faults_name_the_line():
    """An access beyond the slot is found again in the source."""
    b = KernelBuilder("bad")
    x = b.tensor("x", DType.F32, 2, **ROW)
    b.location = Location("bad.py", 12, 3)
    tile = b.tile(DType.F32, 4, 4)
    b.location = Location("bad.py", 13, 3)
    b.load(tile, x.at(0, 0))
    kernel = b.build()
    linked = link("p", [("bad", compile_kernel(kernel, TINY).blob())], TINY)
    words = argument_words(kernel, {"x": TensorArgument(0, 0, (1, 1), (4, 4))})
    records = [(linked.entries[0], words)]
    machine = Definition(TINY)
    machine.write(64, pack_records(records).tobytes())
    slots = (Slot(0, 8), Slot(64, 4096))
    machine.start(Launch(linked.program, launch_arguments(1, 0, records), slots))
    fault = machine.wait().fault
    assert fault.kind.name == "OUT_OF_SLOT"
    line = linked.program.line_at(fault.pc)
    assert (line.file, line.line, line.kernel) == ("bad.py", 13, "bad")
