"""`torch.pagoda`'s streams and events: what is queued, what waits, what fails, and equal bits."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from region_executor import HostExecutor
from torch import nn

import pagoda
from pagoda.compiler.cache import Cache
from pagoda.isa import Chip, Result, load_chip
from pagoda.pytorch import chip as chip_module
from pagoda.pytorch import device
from pagoda.pytorch.anomaly import AnomalyError
from pagoda.runtime import Device, DeviceFault, OutOfDeviceMemory
from pagoda.sim import Simulator

P = "pagoda"
SECONDS = 60.0  # a test that waits so long has failed
TINY = load_chip("tiny")


class GatedSimulator(Simulator):
    """A simulator whose launches stand still while its gate is shut."""

    def __init__(self, chip: Chip) -> None:
        super().__init__(chip)
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()

    def wait(self) -> Result:
        self.reached.set()
        assert self.gate.wait(SECONDS)
        return super().wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Cache:
    return Cache(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def gated(cache: Cache) -> Iterator[GatedSimulator]:
    """The machine of a chip of each test's own; what the process used before comes back."""
    before = (device.state.executor, device.state.allocator)
    device.state.executor = device.state.allocator = None
    machine = GatedSimulator(TINY)
    opened = Device(TINY, machine)
    chip_module.use_device(opened, cache)
    yield machine
    machine.gate.set()
    opened.queue.finish()
    device.state.executor, device.state.allocator = before


def line_of(code: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.strip() == code)
    return number


def placed(*shape: int) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape).to(P)


def warm(function, *args) -> torch.Tensor:
    """What it gives, outside of streams; later calls need not compile, which takes its time."""
    return function(*args).cpu()


# What is queued, and what waits -------------------------------------------------------------------


def test_python_goes_on(gated: GatedSimulator) -> None:
    x, s = placed(4, 8), torch.pagoda.Stream()
    expected = warm(lambda: x + 1)
    gated.gate.clear()
    with torch.pagoda.stream(s):
        assert torch.pagoda.current_stream() == s != torch.pagoda.default_stream()
        y = x + 1
        event = s.record_event()
    assert torch.pagoda.current_stream() == torch.pagoda.default_stream()
    assert not event.query() and not s.query()
    gated.gate.set()
    event.synchronize()
    assert event.query() and torch.equal(y.cpu(), expected)
    s.synchronize()
    assert s.query()


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.cpu(),
        lambda y: torch.tensor(y.tolist()),
        lambda y: torch.tensor([[each.item() for each in row] for row in y]),
        lambda y: torch.tensor(eval(repr(y).replace(", device='pagoda:0'", ""), vars(torch))),
        lambda y: (y * 1).cpu(),
        lambda y: torch.empty(2, 2).copy_(y),
        lambda y: y.sort(descending=True).values.sort().values.cpu(),
    ],
    ids=["cpu", "tolist", "item", "repr", "default stream", "copy_", "host"],
)
@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_reading_waits(gated: GatedSimulator, read) -> None:
    x, s = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(P), torch.pagoda.Stream()
    warm(lambda: read(x * 2))
    gated.gate.clear()
    with torch.pagoda.stream(s):
        y = x * 2
    threading.Timer(0.1, gated.gate.set).start()
    assert torch.equal(read(y), torch.tensor([[2.0, 4.0], [6.0, 8.0]]))


def test_writing_waits_for_what_reads(gated: GatedSimulator) -> None:
    x, s = torch.ones(4).to(P), torch.pagoda.Stream()
    warm(lambda: x * 2)
    gated.gate.clear()
    with torch.pagoda.stream(s):
        y = x * 2
    threading.Timer(0.1, gated.gate.set).start()
    x.copy_(torch.zeros(4))
    assert y.cpu().tolist() == [2] * 4 and x.cpu().tolist() == [0] * 4


def test_the_33rd_operation_waits(gated: GatedSimulator) -> None:
    x, queued = placed(4), []
    warm(lambda: x + 1)
    gated.gate.clear()

    def program() -> None:
        with torch.pagoda.stream(torch.pagoda.Stream()):
            for number in range(33):
                x + 1
                queued.append(number)

    thread = threading.Thread(target=program)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and len(queued) == 32
    gated.gate.set()
    thread.join(SECONDS)
    assert len(queued) == 33
    torch.pagoda.synchronize()


def test_freed_memory_is_not_reused_too_early(gated: GatedSimulator) -> None:
    x, s = placed(64), torch.pagoda.Stream()
    expected = warm(lambda: (x + 1) * 2)
    before = torch.pagoda.memory_allocated()
    gated.gate.clear()
    with torch.pagoda.stream(s):
        y = x + 1
        z = y * 2
    pointer = y.data_ptr()
    del y
    others = [torch.zeros(64).to(P) for _ in range(8)]
    assert pointer not in {other.data_ptr() for other in others}
    gated.gate.set()
    assert torch.equal(z.cpu(), expected)
    del z, others
    s.synchronize()
    assert torch.pagoda.memory_allocated() == before


def test_memory_that_queued_work_keeps_is_waited_for(cache: Cache) -> None:
    machine = GatedSimulator(replace(TINY, dram_bytes=1 << 20))
    chip_module.use_device(Device(machine.chip, machine), cache)
    x, s = torch.ones(75_000).to(P), torch.pagoda.Stream()
    y = x + 1
    del y
    machine.gate.clear()
    with torch.pagoda.stream(s):
        x + 1
        x + 1
    threading.Timer(0.1, machine.gate.set).start()
    assert torch.zeros(75_000).to(P).cpu().sum() == 0


# Events and copies --------------------------------------------------------------------------------


def test_streams_wait_for_events(gated: GatedSimulator) -> None:
    x, one, other = placed(8), torch.pagoda.Stream(), torch.pagoda.Stream(priority=-1)
    expected = warm(lambda: x + 1)
    host = torch.zeros(8)
    gated.gate.clear()
    with one:
        y = x + 1
    other.wait_stream(one)
    with other:
        host.copy_(x, non_blocking=True)  # needs nothing of `one`, but waits for it
        event = torch.pagoda.Event()
        event.record()
    assert not event.query() and (host == 0).all()
    gated.gate.set()
    event.synchronize()
    assert torch.equal(host, x.cpu()) and torch.equal(y.cpu(), expected)
    assert other.priority == -1 and one.priority == 0


def test_elapsed_time_is_that_of_the_cycles() -> None:
    x, s = placed(32, 32), torch.pagoda.Stream()
    start, end, last = (torch.pagoda.Event(enable_timing=True) for _ in range(3))
    warm(lambda: x @ x)
    before = torch.pagoda.cycles()
    warm(lambda: x @ x)
    cycles = torch.pagoda.cycles() - before
    s.wait_stream(torch.pagoda.current_stream())
    with s:
        start.record()
        x @ x
        x @ x
        end.record()
    s.synchronize()
    assert start.elapsed_time(end) == 2 * cycles / TINY.clock_hz * 1e3
    x @ x
    last.record()
    assert end.elapsed_time(last) == cycles / TINY.clock_hz * 1e3


def test_copies_go_on_beside_launches(gated: GatedSimulator) -> None:
    x, launches, copies = placed(8), torch.pagoda.Stream(), torch.pagoda.Stream()
    warm(lambda: x * 3)
    gated.gate.clear()
    with launches:
        y = x * 3
    with copies:
        there = torch.arange(8.0).to(P, non_blocking=True)
        back = there.to("cpu", non_blocking=True)
    copies.synchronize()
    assert back.tolist() == list(range(8)) and not launches.query()
    assert there.cpu().tolist() == list(range(8))  # waits for nothing else
    gated.gate.set()
    assert torch.equal(y.cpu(), x.cpu() * 3)


def test_copies_are_queued_behind_what_they_need(gated: GatedSimulator) -> None:
    x, host, s = placed(8), torch.zeros(8), torch.pagoda.Stream()
    expected = warm(lambda: x * 3)
    gated.gate.clear()
    with s:
        y = x * 3
        host.copy_(y, non_blocking=True)
        y.copy_(torch.ones(8), non_blocking=True)
        y[0] = y[1]
        z = y.to(torch.bfloat16)
    assert (host == 0).all()
    gated.gate.set()
    s.synchronize()
    assert torch.equal(host, expected)
    assert y.cpu().tolist() == z.cpu().tolist() == [1] * 8


# Equal bits ---------------------------------------------------------------------------------------


def trained(compiled: bool, optimizer: type, around) -> tuple[list[bytes], list[torch.Tensor]]:
    """Three steps; losses as bits, and the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3)).to(P)
    steps = optimizer(model.parameters(), lr=0.05)
    forward = torch.compile(model, backend=P) if compiled else model
    losses = []
    with around():
        for step in range(3):
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
            x = x.to(P, non_blocking=True)
            loss = forward(x).square().mean()
            steps.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            losses.append(loss.detach())
    return (
        [each.cpu().numpy().tobytes() for each in losses],
        [parameter.detach().cpu() for parameter in model.parameters()],
    )


@pytest.mark.parametrize(
    ("compiled", "optimizer"), [(False, torch.optim.AdamW), (True, torch.optim.SGD)]
)
def test_training_has_the_same_bits(compiled: bool, optimizer: type) -> None:
    losses, weights = trained(compiled, optimizer, lambda: torch.pagoda.stream(None))
    in_stream = trained(compiled, optimizer, torch.pagoda.Stream)
    assert in_stream[0] == losses
    assert all(map(torch.equal, in_stream[1], weights))
    torch.pagoda.synchronize()


def test_two_threads_with_a_stream_each() -> None:
    x, w = placed(8, 8), placed(8, 8)

    def program(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + x @ w
        return x.cpu()

    expected = {scale: program(x * scale) for scale in (1, 2)}
    found: dict[int, list[torch.Tensor]] = {1: [], 2: []}

    def run(scale: int) -> None:
        with torch.pagoda.Stream():
            for _ in range(10):
                found[scale].append(program(x * scale))

    threads = [threading.Thread(target=run, args=(scale,)) for scale in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for scale, results in found.items():
        assert len(results) == 10
        assert all(torch.equal(each, expected[scale]) for each in results)


def in_function(x: torch.Tensor, s: torch.pagoda.Stream) -> torch.Tensor:
    y = x + 1
    with torch.pagoda.stream(s):
        z = y * 2
        event = torch.pagoda.Event()
        event.record()
    event.wait()
    s.wait_stream(torch.pagoda.current_stream())
    s.synchronize()
    return z - 1


def test_streams_inside_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    x, s = placed(4), torch.pagoda.Stream()
    expected = x.cpu() * 2 + 1
    assert torch.allclose(torch.compile(in_function, backend=P)(x, s).cpu(), expected)


# Failures -----------------------------------------------------------------------------------------


def test_a_fault_is_told_once_with_its_line(gated: GatedSimulator) -> None:
    opened = device.opened()
    x, s, other = placed(1000), torch.pagoda.Stream(), torch.pagoda.Stream()
    warm(lambda: x.sin() + 1)
    opened.watchdog, whole = 300, opened.watchdog
    for _ in range(2):  # its code is there the second time
        with pytest.raises(DeviceFault) as error:
            x.sin()
    at_once = str(error.value)
    with s:
        gated.gate.clear()
        y = x.sin()  # fails
        z = y + 1
        z = z + 1
        z = z + 1
    with other:
        back = x.to("cpu", non_blocking=True)
    gated.gate.set()
    opened.queue.finish()
    opened.watchdog = whole
    other.synchronize()
    assert torch.equal(back, x.cpu())
    with pytest.raises(DeviceFault) as error:
        torch.pagoda.synchronize()
    code = "y = x.sin()  # fails"
    assert str(error.value) == (
        f'{at_once}\nIt was queued on stream 1 by file "{__file__}", line {line_of(code)}, in '
        f"test_a_fault_is_told_once_with_its_line: {code}\n"
        "3 operations queued behind it were not run"
    )
    assert error.value.fault.kind.name == "WATCHDOG"
    s.synchronize()
    torch.pagoda.synchronize()
    with s:
        y = x.sin()
    assert torch.equal(y.cpu(), warm(lambda: x.sin()))


def test_a_result_that_was_not_computed_cannot_be_read() -> None:
    opened = device.opened()
    x, s = placed(1000), torch.pagoda.Stream()
    warm(lambda: x.sin() + 1)
    opened.watchdog, whole = 300, opened.watchdog
    with s:
        y = x.sin()
        z = y + 1
    opened.queue.finish()
    opened.watchdog = whole
    x.cpu()
    with pytest.raises(DeviceFault):
        z + 1  # computes, in no stream
    s.synchronize()


def test_out_of_memory_of_queued_work(cache: Cache) -> None:
    chip_module.use_chip(replace(TINY, dram_bytes=1 << 21), cache)
    x, s = torch.ones(150_000).to(P), torch.pagoda.Stream()
    compiled = torch.compile(lambda x: torch.softmax(x.cumsum(0), 0).cumsum(0), backend=P)
    with s:
        z = compiled(x)
    with pytest.raises(OutOfDeviceMemory) as error:
        z.cpu()
    assert str(error.value).startswith("intermediate results of a compiled graph, ")
    assert f'It was queued on stream 1 by file "{__file__}", line ' in str(error.value)
    assert (x + 1).cpu()[0] == 2 and s.query()


def test_anomalies_stop_at_the_line() -> None:
    x, s = torch.tensor([-1.0]).to(P), torch.pagoda.Stream()
    with pagoda.detect_anomaly(), s, pytest.raises(AnomalyError) as error:
        torch.log(x)
    assert "wrote NaN: 1 of 1 elements" in str(error.value)
    s.synchronize()


def test_profiles_count_what_is_queued_inside(gated: GatedSimulator) -> None:
    x, s = placed(8), torch.pagoda.Stream()
    warm(lambda: x + 1)
    with s:
        x + 1
        with pagoda.profile() as found:
            x + 1
            x + 1
        x + 1
    assert found.launches == 2


# Bad input ----------------------------------------------------------------------------------------


def test_streams_of_another_chip(cache: Cache) -> None:
    old = torch.pagoda.Stream()
    chip_module.use_chip("tiny", cache)
    x = placed(2)
    for use in (lambda: x + 1, lambda: x.to("cpu", non_blocking=True)):
        with old, pytest.raises(RuntimeError) as error:
            use()
        assert str(error.value) == (
            "<torch.pagoda.Stream 1 priority=0> belongs to the chip that was in use before the "
            "last use_chip; make a new one with torch.pagoda.Stream()"
        )


def test_no_chip_no_streams() -> None:
    device.state.executor = device.state.allocator = None
    pagoda.pytorch.use(executor=HostExecutor())
    torch.pagoda.synchronize()
    with pytest.raises(RuntimeError) as error:
        torch.pagoda.Stream()
    assert "device pagoda lies in host memory now, not on a chip" in str(error.value)


def test_what_is_no_stream_or_event() -> None:
    with pytest.raises(TypeError) as error:
        torch.pagoda.stream(3)
    assert str(error.value) == (
        "3 is no stream of device pagoda; make one with torch.pagoda.Stream()"
    )
    with pytest.raises(NotImplementedError) as raised:
        torch.pagoda.Event(interprocess=True)
    assert str(raised.value) == (
        "torch.pagoda.Event: interprocess=True is not possible, for each process has streams of "
        "its own; synchronize, then tell the other process"
    )


def test_torchs_generic_stream_is_the_default_one() -> None:
    generic = torch.Stream(P)
    with torch.pagoda.stream(generic):
        assert torch.pagoda.current_stream() == torch.pagoda.default_stream()
        assert torch.pagoda.current_stream().stream_id == 0
    x = placed(2)
    x.record_stream(torch.pagoda.Stream())
    torch.pagoda.set_stream(torch.pagoda.Stream())
    assert torch.pagoda.current_stream().stream_id > 0
    torch.pagoda.set_stream(torch.pagoda.default_stream())


def test_the_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs/streams.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)  # noqa: S102 - our own document
    assert "ms of the chip's clock" in capsys.readouterr().out
    y, w, x = (names[name].cpu().double() for name in ("y", "w", "x"))
    torch.testing.assert_close(names["found"].double(), y @ w @ x, rtol=1e-4, atol=1e-2)


PROGRAM = """
import torch, pagoda
pagoda.use_chip("tiny")
x, s = torch.ones(50_000).to("pagoda"), torch.pagoda.Stream()
x + 1
with s:
    for _ in range(30):
        x = x + 1
"""


def test_leaving_with_work_in_the_queue(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
