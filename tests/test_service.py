"""The device service: several processes on one chip, none in another's way."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import threading
import time

import numpy as np
import pytest
from command_programs import Assembler
from service_support import (
    ENDLESS,
    ILLEGAL,
    TINY,
    close,
    eventually,
    figures,
    kill,
    multiply,
    run_python,
    serving,
    shared,
)

from pagoda.isa import ChipError, FaultKind, Program, Slot, load_chip
from pagoda.isa.numbers import DType
from pagoda.runtime import (
    Device,
    DeviceFault,
    DeviceLost,
    OutOfDeviceMemory,
    ServiceError,
    open_device,
)
from pagoda.runtime.service.grants import available_host_bytes
from pagoda.runtime.service.protocol import Type

MIB = 1 << 20
CAR = load_chip("car")


def _exit() -> Program:
    assembler = Assembler()
    assembler.control("exit")
    return assembler.program("exit")


EXIT = _exit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "device.sock"
    with serving(path):
        yield path


@pytest.fixture
def share():
    """Opens devices on a service; they are closed after the test."""
    opened = []

    def open_one(path, chip=None, **wishes):
        opened.append(shared(path, chip, **wishes))
        return opened[-1]

    yield open_one
    for each in opened:
        close(each)


@pytest.fixture
def device(path, share):
    eventually(lambda: not figures(path)["contexts"])
    return share(path)


@contextlib.contextmanager
def ctrl_c():
    """Interrupts what is inside, and expects that. Python drops an interrupt that it meets in the
    middle of collecting garbage: after some seconds there is another one. A shell starts what it
    runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    over = threading.Event()

    def strike():
        wait = 0.1
        while not over.wait(wait):
            os.kill(os.getpid(), signal.SIGINT)
            wait = 5.0

    striking = threading.Thread(target=strike)
    striking.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        over.set()
        striking.join()
        signal.signal(signal.SIGINT, before)


def client(path, code: str):
    """A process with a device `d` on the service that runs `code`; prints "ready" before."""
    text = f"""
from service_support import *
d = shared(Path({str(path)!r}))
print("ready", flush=True)
{code}
"""
    process = run_python(text)
    assert process.stdout.readline() == "ready\n"
    return process


def test_bits_and_cycles_are_those_of_an_embedded_device(device):
    embedded = Device(TINY)
    for seed in (1, 2):
        ours, theirs = multiply(device, seed), multiply(embedded, seed)
        assert ours[0] == theirs[0]
        assert ours[1] == theirs[1]
    assert (device.cycles, device.launches) == (embedded.cycles, 2)


def test_a_trace_is_that_of_an_embedded_device(device):
    embedded = Device(TINY)
    with device.tracing(), embedded.tracing():
        ours, theirs = multiply(device)[1].trace, multiply(embedded)[1].trace
    assert len(ours) and (ours == theirs).all()


def test_a_long_trace_comes_through_memory(device):
    embedded = Device(TINY)
    with device.tracing(), embedded.tracing():
        ours, theirs = (multiply(each, rows=50_000)[1].trace for each in (device, embedded))
    assert ours.nbytes > 1 << 16
    assert (ours == theirs).all()


def test_two_processes_at_once(path, device):
    other = client(path, "print(*[multiply(d, 9)[1].cycles for k in range(40)])")
    embedded = Device(TINY)
    found = [multiply(device, 5) for _ in range(20)]
    assert found == [multiply(embedded, 5) for _ in range(20)]
    cycles = [int(word) for word in other.stdout.readline().split()]
    other.wait(10)
    other.stdout.close()
    embedded = Device(TINY)
    assert cycles == [multiply(embedded, 9)[1].cycles for _ in range(40)]


def test_memory_is_zero_and_private(path, device, share):
    address = device.memory.allocate(4 * MIB)
    array = device.array(address, (4 * MIB,), np.uint8)
    assert not array.any()
    array[:] = 7
    other = share(path)
    there = other.memory.allocate(4 * MIB)
    assert there == address  # addresses are each context's own
    assert not other.array(there, (4 * MIB,), np.uint8).any()


def test_released_memory_comes_back_as_zeros(path, device):
    big = device.memory.allocate(100 * MIB)
    device.array(big, (100 * MIB,), np.uint8)[:] = 1
    held = figures(path)["memory_bytes"]
    device.memory.free(big)
    assert figures(path)["memory_bytes"] <= held - 100 * MIB
    again = device.memory.allocate(100 * MIB)
    assert not device.array(again, (100 * MIB,), np.uint8).any()


def test_memory_that_is_left_and_given_back(path, device, share):
    address = device.memory.allocate(40 * MIB)
    share(path).memory.allocate(100 * MIB)
    assert device.memory.available() == (256 - 40 - 100) * MIB
    device.memory.free(address)
    assert (device.memory.reserved, device.memory.allocated) == (40 * MIB, 0)
    assert device.memory.available() == (256 - 100) * MIB
    device.memory.give_back()
    assert device.memory.reserved == 0
    assert figures(path)["memory_bytes"] == 100 * MIB


def test_memory_freed_in_the_middle_of_a_request_is_given_back_later(path, device):
    addresses = [device.memory.allocate(50 * MIB) for _ in range(3)]
    connection = device.machine._connection
    with connection._lock:  # as if the garbage collector struck while something is asked
        for address in addresses:
            device.memory.free(address)
    assert figures(path)["memory_bytes"] == 150 * MIB
    device.memory.allocate(64)
    device.memory.give_back()
    assert figures(path)["memory_bytes"] == 2 * MIB


def test_a_fault_is_precise_and_private(path, device, share):
    other = share(path)
    with pytest.raises(DeviceFault) as raised:
        other.launch(ILLEGAL)
    with pytest.raises(DeviceFault) as expected:
        Device(TINY).launch(ILLEGAL)
    assert str(raised.value) == str(expected.value)
    assert raised.value.fault == expected.value.fault
    assert raised.value.fault.kind is FaultKind.ILLEGAL_INSTRUCTION
    assert multiply(other)[0] == multiply(device)[0]
    of_pid = {each["context"]: each["faults"] for each in figures(path)["contexts"]}
    assert sorted(of_pid.values()) == [0, 1]


def test_slots_outside_of_grants_are_refused(device):
    inside = device.memory.allocate(64)
    device.launch(EXIT, (), [Slot(inside, 64)])
    for slot, shown in (
        (Slot(8 * MIB, 64), "slot 0, 64 bytes at 0x800000"),
        (Slot(0, 2 * MIB + 1), "slot 0, 2,097,153 bytes at 0x0"),
    ):
        message = (
            f"launch of 'exit': {shown}: not in memory that the device service has granted to "
            "this process; allocate it from the device first"
        )
        with pytest.raises(ValueError, match=re.escape(message) + "$"):
            device.launch(EXIT, (), [slot])
    device.launch(EXIT, (), [Slot(inside, 64)])


def test_a_remembered_launch_is_checked_again_after_release(device):
    big = device.memory.allocate(100 * MIB)
    device.launch(EXIT, (), [Slot(big, 64)])
    device.memory.free(big)  # goes back to the service
    with pytest.raises(ValueError, match="not in memory that the device service has granted"):
        device.launch(EXIT, (), [Slot(big, 64)])


def test_forgotten_programs_are_sent_again(path, share):
    opened = share(path)
    for number in range(3):
        opened.machine._numbers[id(ILLEGAL)] = ILLEGAL, 10_000 + number
        with pytest.raises(DeviceFault):
            opened.launch(ILLEGAL)


def test_a_killed_client_leaves_nothing(path, device):
    process = client(path, "d.memory.allocate(200 << 20)\nd.launch(ENDLESS)")
    eventually(lambda: [e for e in figures(path)["contexts"] if e["state"] == "running"])
    assert figures(path)["memory_bytes"] >= 200 * MIB
    kill(process)
    assert multiply(device)[0] == multiply(Device(TINY))[0]
    eventually(lambda: len(figures(path)["contexts"]) == 1)
    assert figures(path)["memory_bytes"] == 2 * MIB


def test_clients_killed_while_they_wait(path, device):
    running = client(path, "d.launch(ENDLESS)")
    eventually(lambda: [e for e in figures(path)["contexts"] if e["state"] == "running"])
    waiting = [client(path, "d.launch(ENDLESS)") for _ in range(2)]
    eventually(
        lambda: sum(e["state"] == "waiting" for e in figures(path)["contexts"]) == 2
    )
    for process in (waiting[0], running, waiting[1]):
        kill(process)
    assert multiply(device)[0] == multiply(Device(TINY))[0]


SLOW_WATCH = """
import time
from pagoda.runtime.service.watch import Watch
happened = Watch._happened
Watch._happened = lambda self, fd: (time.sleep(0.05), happened(self, fd))
"""


def test_the_end_of_a_client_is_not_taken_for_that_of_the_next(tmp_path):
    """One whose descriptors have the same numbers. Clients come and go, three at a time; a watch
    that is slow sees their ends when others have come."""
    path, chance, opened = tmp_path / "s", random.Random(0), []
    with serving(path, before=SLOW_WATCH), contextlib.ExitStack() as stack:
        for _ in range(20):
            for leaving in opened[: chance.randint(1, 3)]:
                opened.remove(leaving)
                close(leaving)
            time.sleep(chance.choice((0.0, 0.02)))
            while len(opened) < 3:
                opened.append(shared(path))
                stack.callback(close, opened[-1])
            time.sleep(0.02)
            for each in opened:
                multiply(each)  # else DeviceLost


def test_reset_ends_launches_and_contexts(path, share):
    victim, bystander = share(path), share(path)
    address = bystander.place(np.arange(16))
    lost: list[DeviceLost] = []

    def run() -> None:
        try:
            victim.launch(ENDLESS)
        except DeviceLost as error:
            lost.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: [e for e in figures(path)["contexts"] if e["state"] == "running"])
    control = share(path)
    control.machine._connection.ask(Type.RESET)
    thread.join(20)
    assert not thread.is_alive()
    message = (
        "what its tensors hold can still be copied to the host; "
        "open it again with pagoda.use_chip"
    )
    assert str(lost[0]).startswith("the device was reset by ")
    assert str(lost[0]).endswith(f" (process {os.getpid()}); {message}")
    for opened in (victim, bystander, control):
        with pytest.raises(DeviceLost, match="the device was reset by"):
            opened.launch(EXIT)
        with pytest.raises(DeviceLost, match="the device was reset by"):
            opened.memory.allocate(8 * MIB)
    assert (bystander.array(address, (16,), np.int64) == np.arange(16)).all()
    fresh = share(path)
    assert multiply(fresh)[0] == multiply(Device(TINY))[0]


def test_ctrl_c_ends_a_launch_and_leaves_the_device(device):
    for _ in range(3):
        with ctrl_c():
            device.launch(ENDLESS)
        assert multiply(device)[0] == multiply(Device(TINY))[0]


def test_an_exception_of_a_signal_handler_ends_a_launch_too(device):
    def late(number, frame):
        raise TimeoutError("too late")

    before = signal.signal(signal.SIGALRM, late)
    try:
        for _ in range(3):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(TimeoutError, match="too late"):
                device.launch(ENDLESS)
            assert multiply(device)[0] == multiply(Device(TINY))[0]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_interrupts_at_any_moment_tear_nothing(device):
    expected = multiply(Device(TINY))[0]

    def strike(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    struck = 0
    try:
        for number in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + number % 50 * 1e-5)
                for _ in range(20):
                    device.launch(EXIT)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                struck += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck > 10
    assert multiply(device)[0] == expected


def test_ctrl_c_ends_the_wait_for_a_turn(path, device):
    busy = client(path, "d.launch(ENDLESS)")
    eventually(lambda: [e for e in figures(path)["contexts"] if e["state"] == "running"])
    with ctrl_c():
        device.launch(ENDLESS)
    kill(busy)
    assert multiply(device)[0] == multiply(Device(TINY))[0]


def test_out_of_memory_says_who_holds_what(path, device, share):
    device.memory.allocate(100 * MIB)
    other = share(path)
    other.memory.allocate(100 * MIB)
    with pytest.raises(OutOfDeviceMemory) as raised:
        other.memory.allocate(80 * MIB)
    found = re.sub(r"\S+ \(process \d+, user \w+\)", "NAME", str(raised.value))
    assert found == (
        "device memory is full: 83,886,080 bytes asked for: NAME needs 83,886,080 bytes more of "
        "the shared device, but of the chip's 268,435,456 only 58,720,256 are free; it holds "
        "104,857,600, others hold 104,857,600; free tensors, use a smaller batch or sequence, or "
        "end other programs"
    )
    assert other.memory.allocate(30 * MIB)


def test_a_memory_limit(path, share):
    limited = share(path, memory_limit="8 MiB")
    limited.memory.allocate(5 * MIB)
    with pytest.raises(OutOfDeviceMemory, match=r"but its limit is 8,388,608; it holds 6,291,456"):
        limited.memory.allocate(5 * MIB)
    limited.memory.allocate(2 * MIB)


def test_an_embedded_device_has_a_memory_limit_too():
    limited = open_device(TINY, memory_limit=MIB, environment={"PAGODA_DEVICE": "embedded"})
    with pytest.raises(OutOfDeviceMemory):
        limited.memory.allocate(MIB)


def test_writing_outside_of_grants_ends_the_context(path, device):
    device.memory.allocate(64)
    device.machine.dram[16 * MIB : 24 * MIB] = 1
    eventually(lambda: figures(path)["contexts"][0]["state"] == "lost")
    with pytest.raises(DeviceLost, match="were not granted to it, and was ended"):
        device.launch(EXIT)


def test_a_forked_process_cannot_use_the_device(device):
    pid = os.fork()
    if pid == 0:
        try:
            device.launch(EXIT)
        except DeviceLost as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    device.launch(EXIT)


def test_a_closed_device_is_free_though_a_child_holds_its_socket(path, share):
    opened = share(path)
    address = opened.memory.allocate(64 * MIB)
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    close(opened)
    eventually(lambda: not figures(path)["contexts"])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(DeviceLost, match="the device was closed; open it again"):
        opened.launch(EXIT)
    opened.memory.free(address)


def test_a_fault_tells_what_the_engines_were_at(device):
    assembler = Assembler()
    line = dict(mem=DType.F32, local=DType.F32, offset=0, rows=1, planes=1, mem_row_stride=0,
                row_stride=0, cols=512)  # fmt: skip
    assembler.command("load", slot=0, address=0, **line)
    assembler.command("store", slot=0, address=0, **line)  # waits for the load
    assembler.command("load", slot=1, address=4096, **line)  # there is no slot 1
    program = assembler.program("faulty")
    raised = []
    for each in (device, Device(TINY)):
        address = each.memory.allocate(4096)
        with pytest.raises(DeviceFault) as error:
            each.launch(program, slots=(Slot(address, 4096),))
        raised.append(error.value)
    ours, theirs = raised
    assert ours.in_flight == theirs.in_flight
    assert [(each.command, each.engine) for each in ours.in_flight] == [("load", 0), ("store", 1)]
    load, store = ours.in_flight
    (note,) = ours.__notes__
    assert note == (
        f"engines at cycle {ours.fault.cycle}:\n"
        f"  core 0 load   load (command 0, pc {load.pc:#x}): entered {load.entry}, started "
        f"{load.start}, until {load.finish}\n"
        f"  core 0 store  store (command 1, pc {store.pc:#x}): entered {store.entry}, waits"
    )


def test_stopping_tells_what_runs(tmp_path, share):
    path = tmp_path / "s"
    with serving(path) as process:
        opened = share(path)
        threading.Timer(0.3, process.terminate).start()
        with pytest.raises(DeviceLost) as raised:
            opened.launch(ENDLESS)
        assert str(raised.value) == (
            f"the device service on {path} was stopped; what its tensors hold can still be copied "
            "to the host; open it again with pagoda.use_chip"
        )
        assert process.wait(10) == 0
        assert not path.exists()


def test_a_host_without_memory(tmp_path, share):
    path = tmp_path / "s"
    before = "import pagoda.runtime.service.server as server\n"
    before += "server.available_host_bytes = lambda: 5 << 20"
    with serving(path, before=before):
        opened = share(path)
        opened.memory.allocate(3 * MIB)
        message = "but this computer has only 1,048,576 left for the simulated DRAM; it holds"
        with pytest.raises(OutOfDeviceMemory, match=message):
            opened.memory.allocate(3 * MIB)


def test_memory_of_this_host():
    assert 1 << 20 < available_host_bytes() < 1 << 50


def test_another_chip_than_the_service_has(path, share):
    with pytest.raises(ServiceError) as raised:
        share(path, CAR)
    assert str(raised.value) == (
        f"chip 'car' was asked for, but PAGODA_DEVICE={path} names a service whose chip 'tiny' "
        "differs; leave the chip out to use that one, or set PAGODA_DEVICE=embedded for a device "
        "of this program's own"
    )


def test_limits_of_users(tmp_path, share):
    path = tmp_path / "s"
    limits = (
        f"limits=Limits(UserLimits(), (({os.getuid()}, UserLimits({20 * MIB}, 2.0, 3)),))"
    )
    with serving(path, options=limits):
        one = share(path, priority=3, time_share=2)
        two = share(path)
        one.memory.allocate(12 * MIB)
        with pytest.raises(OutOfDeviceMemory, match="may hold 20,971,520 and hold 12,582,912"):
            two.memory.allocate(12 * MIB)
        for wish, shown in ((dict(priority=4), "priority = 4"), (dict(time_share=3.0), "3.0")):
            with pytest.raises(ServiceError, match=f"{shown}: user .* may have at most"):
                share(path, **wish)


def test_a_watchdog_of_the_service(tmp_path, share):
    path = tmp_path / "s"
    limits = "limits=Limits(UserLimits(watchdog=5000))"
    with serving(path, options=limits), pytest.raises(DeviceFault) as raised:
        share(path).launch(ENDLESS)
    assert raised.value.fault.kind is FaultKind.WATCHDOG


def test_a_trace_without_end(tmp_path, share):
    path = tmp_path / "s"
    before = "import pagoda.sim.machine as machine\nmachine._FIRST_TRACE_ROWS = 64\n"
    before += "import pagoda.runtime.service.server as server\nserver._PART_OF_HOST = 1 << 40"
    with serving(path, before=before):
        device = share(path)
        with device.tracing(), pytest.raises(ValueError, match="there is no room for more; trace"):
            multiply(device, rows=50_000)
        assert multiply(device)[0] == multiply(Device(TINY))[0]


def test_a_share_that_no_tenant_can_have(path, share):
    with pytest.raises(ValueError) as raised:
        share(path, time_share=1e-9)
    assert str(raised.value) == (
        "time_share = 1e-09: must be from 1e-06 to 1e+06; 2 is twice the share of those that ask "
        "for none"
    )
    with pytest.raises(ValueError, match="priority = 5000: must be a whole number from -1000 to"):
        share(path, priority=5000)


def test_partitions_run_at_the_same_time(tmp_path, share):
    path = tmp_path / "s"
    with serving(path, CAR):
        three = share(path, cores=3)
        process = run_python(
            "from service_support import *\n"
            f"d = shared(Path({str(path)!r}), cores=1)\n"
            "d.launch(ENDLESS)"
        )
        eventually(lambda: figures(path)["queue"]["running"])
        found, result = multiply(three)  # though the other's launch never ends
        queue = figures(path)["queue"]
        assert [turn["cores"] for turn in queue["running"]] == [[0]]
        kill(process)
        eventually(lambda: not figures(path)["queue"]["running"])
        alone = multiply(Device(three.chip))
        assert (found, result.cycles) == (alone[0], alone[1].cycles)


def test_partitions_of_cores(tmp_path, share):
    path = tmp_path / "s"
    with serving(path, CAR):
        part = share(path, cores=1)
        embedded = open_device(CAR, cores=1, environment={"PAGODA_DEVICE": "embedded"})
        assert part.chip == embedded.chip == CAR.partition(1)
        assert multiply(part)[1] == multiply(embedded)[1]
        with pytest.raises(ServiceError, match="a partition of 5 cores: the chip has 4"):
            share(path, cores=5)


def test_a_partition_owns_its_share_of_the_bandwidth():
    assert CAR.partition(3).dram_share == CAR.dram_share
    assert CAR.partition(4) is CAR
    with pytest.raises(ChipError, match="a partition of 0 cores: the chip has 4; ask for 1 to 4"):
        CAR.partition(0)


WEDGED = """
import threading
from pagoda.sim import Simulator

class Wedged(Simulator):
    def wait(self):
        if self._launch.program.name == "endless":
            threading.Event().wait()
        return super().wait()
"""


def test_reset_recovers_from_a_wedged_machine(tmp_path, share):
    path = tmp_path / "s"
    machine = "machine=lambda chip, dram: Wedged(chip, dram=dram)"
    with serving(path, options=machine, before=WEDGED):
        stuck = client(path, "d.memory.allocate(200 << 20)\nd.launch(ENDLESS)")
        eventually(lambda: [e for e in figures(path)["contexts"] if e["state"] == "running"])
        behind = client(path, "d.launch(ENDLESS)")
        eventually(lambda: [e for e in figures(path)["contexts"] if e["state"] == "waiting"])
        control = share(path)
        control.machine._connection.ask(Type.RESET)
        fresh = share(path)
        fresh.memory.allocate(200 * MIB)
        assert multiply(fresh)[0] == multiply(Device(TINY))[0]
        assert behind.wait(10) == 1  # DeviceLost
        behind.stdout.close()
        kill(stuck)


def test_a_killed_service_is_one_clear_error(tmp_path, share):
    path = tmp_path / "s"
    with serving(path) as process:
        opened = share(path)
        address = opened.place(np.arange(8))
        timer = threading.Timer(0.3, process.kill)
        timer.start()
        with pytest.raises(DeviceLost) as raised:
            opened.launch(ENDLESS)
        message = (
            f"the device service on {path} went away during launch of 'endless'; what its tensors "
            "hold can still be copied to the host; start the service again with `pagoda device "
            "start`, and the program"
        )
        assert re.sub(r" \(\[Errno.*?\)", "", str(raised.value)) == message
        with pytest.raises(DeviceLost, match="went away during launch of 'endless'"):
            opened.launch(ENDLESS)
        assert (opened.array(address, (8,), np.int64) == np.arange(8)).all()
        opened.memory.free(address)


def test_no_shared_memory(tmp_path, share):
    path = tmp_path / "s"
    with serving(path) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(ServiceError) as raised:
            share(path)
    assert str(raised.value) == (
        "no shared memory of 268,435,456 bytes for the device's DRAM: File too large; raise the "
        "limits of the service on memory and file size (ulimit -v, ulimit -f), or choose a chip "
        "with less DRAM"
    )
