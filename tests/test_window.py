"""The window rule on small cases worked out by hand, and against a rule stepped cycle by cycle."""

from hypothesis import given
from hypothesis import strategies as st

from pagoda.isa import PRESETS
from pagoda.isa.access import SRAM, Range
from pagoda.isa.machine import CAUSES
from pagoda.isa.timing import Duration
from pagoda.isa.window import Entry, Window

TINY = PRESETS["tiny"]  # window of 8, one DRAM atom every 4 cycles


def make(index, engine, duration, reads=(), writes=(), ports=(0, 0)):
    ranges = [[Range(SRAM, *bounds) for bounds in both] for both in (reads, writes)]
    return Entry(index, engine, duration, *ranges, *ports)


def run(*commands):
    """Enter (entry cycle, command) pairs; (start, finish, cause) of each."""
    window = Window(TINY)
    for cycle, entry in commands:
        assert window.space(cycle) == cycle
        window.enter(entry, cycle)
    window.drain()
    return [(entry.start, entry.finish, entry.cause) for _, entry in commands]


def test_a_command_starts_two_cycles_after_its_entry():
    assert run((10, make(0, "vector", Duration(5, 3)))) == [(12, 20, "entry")]


def test_an_engine_takes_the_next_command_when_it_is_free():
    first, second = make(0, "vector", Duration(9, 3)), make(1, "vector", Duration(5, 3))
    assert run((10, first), (15, second)) == [(12, 24, "entry"), (21, 29, "engine")]


def test_a_hazard_waits_for_the_finish():
    writer = make(0, "load", Duration(4, 28, 0), writes=[(0, 63)])
    reader = make(1, "vector", Duration(5, 3), reads=[(60, 99)])
    other = make(2, "matrix", Duration(5, 3), reads=[(64, 99)])
    assert run((10, writer), (15, reader), (20, other)) == [
        (12, 44, "entry"),
        (44, 52, "hazard"),
        (22, 30, "entry"),
    ]


def test_load_and_store_share_the_dram_port():
    load, store = make(0, "load", Duration(15, 28, 0)), make(1, "store", Duration(4, 16, 2))
    # slots open in 0, 4, 8, ...; the store's first one is that of cycle 32, 2 cycles after 27
    assert run((10, load), (15, store)) == [(12, 27 + 28, "entry"), (27, 52, "dram port")]


def test_a_bank_port_is_held_until_the_finish():
    first = make(0, "vector", Duration(5, 4), ports=(1, 2))
    reader = make(1, "matrix", Duration(5, 4), ports=(1, 0))
    writer = make(2, "load", Duration(1, 28), ports=(2, 1))
    assert run((10, first), (15, reader), (20, writer)) == [
        (12, 21, "entry"),
        (21, 30, "bank port"),
        (22, 51, "entry"),
    ]


def test_one_command_starts_in_a_cycle_and_the_oldest_goes_first():
    blocker = make(0, "load", Duration(1, 28), writes=[(0, 9)])
    second = make(1, "vector", Duration(5, 4), reads=[(0, 9)])
    third = make(2, "matrix", Duration(5, 4), reads=[(0, 9)])
    assert run((10, blocker), (15, second), (20, third)) == [
        (12, 41, "entry"),
        (41, 50, "hazard"),
        (42, 51, "start slot"),
    ]


def test_a_younger_command_overtakes_and_can_delay_an_older_one():
    load = make(0, "load", Duration(1, 28), writes=[(0, 9)])
    waits = make(1, "vector", Duration(5, 4), reads=[(0, 9)], ports=(1, 0))
    overtakes = make(2, "matrix", Duration(50, 4), ports=(1, 0))
    assert run((10, load), (15, waits), (20, overtakes)) == [
        (12, 41, "entry"),
        (76, 85, "bank port"),
        (22, 76, "entry"),
    ]


def test_a_full_window_has_space_when_the_first_entry_finishes():
    window = Window(TINY)
    entries = [make(k, "vector", Duration(100, 4)) for k in range(8)]
    for k, entry in enumerate(entries):
        window.enter(entry, window.space(10 + 5 * k))
    assert window.space(50) == 12 + 104
    assert window.space(117) == 117


def test_a_word_of_sram_waits_for_its_writers():
    window = Window(TINY)
    window.enter(make(0, "load", Duration(1, 28), writes=[(0, 9)]), 10)
    window.enter(make(1, "vector", Duration(5, 3), reads=[(0, 3)], writes=[(20, 23)]), 15)
    assert window.written(Range(SRAM, 20, 23), 20) == 49
    assert window.written(Range(SRAM, 24, 27), 20) == 20
    assert window.drain() == 49


def test_results_of_the_vector_engine_stay_in_order():
    window = Window(TINY)
    window.enter(make(0, "vector", Duration(8, 28)), 10)
    entries = [make(k, "vector", Duration(2, tail)) for k, tail in ((1, 4), (2, 8))]
    for k, entry in enumerate(entries):
        window.enter(entry, 15 + 5 * k)
    window.drain()
    # The first finishes in 12 + 8 + 28 = 48; tails of 4 and 8 let the others start in 44 and 46.
    assert [(e.start, e.finish, e.cause) for e in entries] == [
        (44, 50, "engine"),
        (46, 56, "engine"),
    ]


def stepped(commands, window_size):
    """The rule cycle by cycle, as `window` states it. Commands: (gap, Entry)."""
    cycle, done, waiting = 0, [], list(commands)
    next_entry = waiting[0][0]
    free, dram_free, results_free = {}, 0, 0
    while waiting or any(e.start < 0 for e in done):
        if waiting and cycle >= next_entry and sum(e.finish > cycle for e in done) < window_size:
            _, entry = waiting.pop(0)
            entry.entry = cycle
            done.append(entry)
            next_entry = cycle + waiting[0][0] if waiting else 0
        heads = {}
        for entry in done:
            if entry.start < 0:
                heads.setdefault(entry.engine, entry)
        for head in heads.values():
            dma = head.engine in ("load", "store")
            ready = cycle >= head.entry + 2 and cycle >= free.get(head.engine, 0)
            ready = ready and not (dma and cycle < dram_free)
            if head.engine == "vector":
                ready = ready and cycle + head.duration.tail >= results_free
            for other in done:
                if other.finish > cycle and other.index < head.index and other.conflicts(head):
                    ready = False
                running = 0 <= other.start < cycle < other.finish
                if running and other.engine != head.engine and other.shares_port(head):
                    ready = False
            if ready:
                head.start, head.free = cycle, cycle + head.duration.occupancy_from(TINY, cycle)
                head.finish = head.free + head.duration.tail
                free[head.engine] = head.free
                dram_free = head.free if dma else dram_free
                results_free = head.finish if head.engine == "vector" else results_free
                break
        cycle += 1
    return [(e.entry, e.start, e.free, e.finish) for e in done]


@st.composite
def command_lists(draw):
    """Lists of (cycles after the previous entry, engine, duration, ranges, ports)."""
    small = st.integers(0, 5)
    bounds = st.tuples(small, small).map(sorted).map(tuple)
    ranges = st.lists(bounds, max_size=2)
    one = st.tuples(
        st.integers(1, 12), st.sampled_from(["load", "store", "matrix", "vector"]),
        st.integers(1, 30), st.integers(0, 20), st.integers(0, 4), ranges, ranges,
        st.tuples(small, small),
    )  # fmt: skip
    return draw(st.lists(one, min_size=1, max_size=16))


@given(command_lists())
def test_events_agree_with_the_rule_stepped_cycle_by_cycle(drawn):
    def entries():
        for index, (gap, engine, occupancy, tail, lead, reads, writes, ports) in enumerate(drawn):
            dma = lead if engine in ("load", "store") else None
            yield gap, make(index, engine, Duration(occupancy, tail, dma), reads, writes, ports)

    window, cycle, ours = Window(TINY), 0, []
    for gap, entry in entries():
        cycle = window.space(cycle + gap)
        window.enter(entry, cycle)
        ours.append(entry)
    last = window.drain()
    expected = stepped(entries(), TINY.window)
    assert [(e.entry, e.start, e.free, e.finish) for e in ours] == expected
    assert last == max(e.finish for e in ours)
    assert {e.cause for e in ours} <= set(CAUSES)
