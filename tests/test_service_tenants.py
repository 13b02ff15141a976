"""Two clients say whatever they like to a service; a model knows who owns what.

Whatever one of them forges, breaks off or makes up, the service answers it or ends its connection;
the other keeps its memory to the bit, the service's figures agree with the model, and in the end
all memory is free. The slow test looks for messages that break the decoders, with atheris if it is
installed (`pip install atheris`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from command_programs import Assembler
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from service_support import ENDLESS, ILLEGAL, TINY, eventually, serving

from pagoda import __version__
from pagoda.isa import CONTRACT_VERSION, Launch, Program, Slot
from pagoda.isa.numbers import DType
from pagoda.runtime.service.grants import unit_bytes
from pagoda.runtime.service.launches import Outcome, pack_launch, unpack_result
from pagoda.runtime.service.protocol import (
    HEADER,
    MAGIC,
    VERSION,
    Channel,
    Message,
    ProtocolError,
    Type,
    pack,
)
from pagoda.runtime.service.remote import Connection
from pagoda.runtime.service.shared_memory import map_shared

UNIT = unit_bytes(TINY.dram_bytes)
HEAD = 64  # bytes that COPY copies
WATCHDOG = 1 << 20
EDGES = (0, 1, UNIT - 64, UNIT, 3 * UNIT, TINY.dram_bytes - UNIT, TINY.dram_bytes, 1 << 32, 1 << 50)


def _copy() -> Program:
    """The first bytes of slot 0 to those of slot 1."""
    assembler = Assembler()
    fields = dict(mem=DType.I32, local=DType.I32, offset=0, address=0, cols=HEAD // 4, rows=1,
                  planes=1, mem_row_stride=0, mem_plane_stride=0, row_stride=0, plane_stride=0)
    assembler.command("load", slot=0, **fields)  # fmt: skip
    assembler.command("store", slot=1, **fields)
    assembler.control("exit")
    return assembler.program("copy")


COPY = _copy()


class Ended(Exception):
    """The service has ended the connection."""


@dataclass(eq=False)
class Client:
    """A client that does not keep to anything. grants: start -> what its bytes should be."""

    path: Path
    name: str
    grants: dict[int, np.ndarray] = field(default_factory=dict)
    programs: int = 0  # sent; their numbers are those below, and COPY's is 0

    def __post_init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(self.path))
        self.channel = Channel(self.socket)
        hello = dict(contract=CONTRACT_VERSION, pagoda=__version__, name=self.name)
        self.ask(Type.HELLO, **hello)
        wishes = dict(cores=None, priority=0, time_share=None, memory_limit=None)
        self.channel.send(Type.OPEN, 2, pack(Type.OPEN, **wishes))
        answer, (memory, interrupt), _, _ = socket.recv_fds(self.socket, 1 << 16, 2)
        assert HEADER.unpack_from(answer)[2] == Type.OPENED
        self.dram = np.frombuffer(map_shared(memory, TINY.dram_bytes), np.uint8)
        os.close(memory)
        os.close(interrupt)
        self.add(COPY)

    def add(self, program: Program) -> int:
        """The number of a program, now that it has been sent."""
        fields = dict(name=program.name, code=program.code, entry=0, stack_limit=0)
        number = self.ask(Type.PROGRAM, **fields).fields()["program"]
        assert number == self.programs
        self.programs += 1
        return number

    def send(self, kind: Type, body: bytes) -> Message:
        """The answer to a request. Raises Ended."""
        try:
            self.channel.send(kind, 7, body)
            answer = self.channel.receive()
        except (OSError, ProtocolError):
            answer = None
        if answer is None:
            raise Ended
        if answer.type is Type.REFUSED and answer.fields()["code"] == "protocol":
            assert self.channel.receive() is None  # and then it hangs up
            raise Ended
        return answer

    def ask(self, kind: Type, **fields: object) -> Message:
        return self.send(kind, pack(kind, **fields))

    def launch(self, number: int, program: Program, *slots: Slot) -> Message:
        launch = Launch(program, (), slots, WATCHDOG)
        return self.send(Type.LAUNCH, pack_launch(number, False, launch))

    def owns(self, start: int, nbytes: int) -> bool:
        """Whether all units that the bytes lie in are granted."""
        owned = {u for s, held in self.grants.items() for u in range(s, s + len(held), UNIT)}
        first, last = start // UNIT, (start + nbytes - 1) // UNIT
        return start + nbytes <= TINY.dram_bytes and (
            not nbytes or owned >= {UNIT * u for u in range(first, last + 1)}
        )

    @property
    def held(self) -> int:
        return sum(len(held) for held in self.grants.values())

    def close(self) -> None:
        self.channel.close()


def message(kind: int, body: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, len(body), 1) + body


who = st.integers(0, 1)
addresses = st.sampled_from(EDGES) | st.integers(0, TINY.dram_bytes // 64).map(lambda n: 64 * n)
requests = st.sampled_from([
    (Type.GRANT, pack(Type.GRANT, bytes=UNIT, release=[])),
    (Type.RELEASE, pack(Type.RELEASE, release=[[0, UNIT]])),
    (Type.PROGRAM, pack(Type.PROGRAM, name="p", code=bytes(8), entry=0, stack_limit=0)),
    (Type.LAUNCH, pack_launch(0, False, Launch(COPY, (1, 2), (Slot(0, 64),), 1000))),
    (Type.RESUME, pack(Type.RESUME)),
    (Type.STATUS, pack(Type.STATUS)),
])  # fmt: skip


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A message cut off, a message with another byte in it, or no message at all. None that the
    service's owner may send: to reset or stop it."""
    whole = message(*draw(requests))
    match draw(st.integers(0, 2)):
        case 0:
            return whole[: draw(st.integers(1, len(whole) - 1))]
        case 1:
            at = draw(st.integers(0, len(whole) - 1))
            data = whole[:at] + draw(st.binary(min_size=1, max_size=1)) + whole[at + 1 :]
            assume(HEADER.unpack_from(data)[2] not in (Type.RESET, Type.STOP))
            return data
        case _:
            return draw(st.binary(min_size=1, max_size=100))


class Tenants(RuleBasedStateMachine):
    """See above. `path` and `control`, a connection, are set by the test."""

    path: Path
    control: Connection

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client | None] = [None, None]

    def client(self, who: int) -> Client:
        if self.clients[who] is None:
            self.clients[who] = Client(self.path, f"client {who}")
        return self.clients[who]

    def forget(self, who: int) -> None:
        self.clients[who].close()
        self.clients[who] = None

    # What a client may do. ------------------------------------------------------------------------

    @rule(who=who, nbytes=st.sampled_from((1, UNIT, UNIT + 1, 3 * UNIT)), value=st.integers(1, 255))
    def grant(self, who: int, nbytes: int, value: int) -> None:
        client = self.client(who)
        answer = client.ask(Type.GRANT, bytes=nbytes, release=[]).fields()
        start, size = answer["start"], answer["bytes"]
        assert size >= nbytes and not any(
            start < other + len(held) and other < start + size
            for other, held in client.grants.items()
        )
        assert not client.dram[start : start + size].any()
        client.grants[start] = np.full(size, value, np.uint8)
        client.dram[start : start + size] = value

    @rule(who=who, data=st.data())
    def release(self, who: int, data: st.DataObject) -> None:
        client = self.client(who)
        if client.grants:
            start = data.draw(st.sampled_from(sorted(client.grants)))
            answer = client.ask(Type.RELEASE, release=[[start, len(client.grants.pop(start))]])
            assert answer.type is Type.DONE

    @rule(who=who, data=st.data())
    def copy(self, who: int, data: st.DataObject) -> None:
        client = self.client(who)
        if not client.grants:
            return
        source, target = (data.draw(st.sampled_from(sorted(client.grants))) for _ in range(2))
        answer = client.launch(0, COPY, Slot(source, HEAD), Slot(target, HEAD))
        outcome, result = unpack_result(answer.body, (), False)
        assert outcome is Outcome.FINISHED and result.fault is None
        client.grants[target][:HEAD] = client.grants[source][:HEAD]

    @rule(who=who, program=st.sampled_from((ILLEGAL, ENDLESS)))
    def fault(self, who: int, program: Program) -> None:
        client = self.client(who)
        answer = client.launch(client.add(program), program)
        outcome, result = unpack_result(answer.body, (), False)
        assert outcome is Outcome.FINISHED and result.fault is not None

    @rule(who=who)
    def leave(self, who: int) -> None:
        self.client(who)
        self.forget(who)

    # What it may not. -----------------------------------------------------------------------------

    @rule(who=who, start=addresses, nbytes=st.sampled_from(EDGES[:8]) | st.integers(0, UNIT))
    def launch_with_a_forged_slot(self, who: int, start: int, nbytes: int) -> None:
        client = self.client(who)
        if start % 64 or nbytes >= 1 << 32:
            return
        before = {s: client.dram[s : s + HEAD].copy() for s in client.grants}
        answer = client.launch(0, COPY, Slot(start, nbytes), Slot(start, nbytes))
        if client.owns(start, nbytes):
            assert answer.type is Type.RESULT  # to itself, or a fault: no byte changes
        else:
            assert answer.fields()["code"] == "slot"
        for s, head in before.items():
            assert (client.dram[s : s + HEAD] == head).all()

    @rule(who=who, number=st.sampled_from((1, 2, 3, 1 << 31, (1 << 32) - 1)))
    def launch_a_program_of_nobody(self, who: int, number: int) -> None:
        """Numbers are each context's own: what the other calls by one means nothing here."""
        client = self.client(who)
        if number >= client.programs:
            answer = client.launch(number, COPY)
            assert unpack_result(answer.body, (), False)[0] is Outcome.UNKNOWN_PROGRAM

    @rule(who=who, start=addresses, nbytes=st.sampled_from(EDGES), also=st.booleans())
    def release_what_is_not_its_own(self, who: int, start: int, nbytes: int, also: bool) -> None:
        client = self.client(who)
        if client.owns(start, nbytes) and nbytes and not (start % UNIT or nbytes % UNIT):
            return
        forged = [[start, nbytes]]
        if also and client.grants:  # a good one before the bad one
            first, held = next(iter(client.grants.items()))
            forged.insert(0, [first, len(held)])
        try:
            client.ask(Type.RELEASE, release=forged)
        except Ended:
            self.forget(who)
        else:
            raise AssertionError(f"{forged} was released")

    @rule(who=who, kind=st.sampled_from([t for t in Type if t >= Type.WELCOME] + [Type.HELLO]))
    def send_what_is_no_request(self, who: int, kind: Type) -> None:
        client = self.client(who)
        fields = dict(contract=CONTRACT_VERSION, pagoda=__version__, name="again")
        body = pack(Type.HELLO, **fields) if kind is Type.HELLO else b"\x80"
        with contextlib.suppress(Ended):
            raise AssertionError(client.send(kind, body))
        self.forget(who)

    @rule(who=who, data=broken())
    def break_the_protocol(self, who: int, data: bytes) -> None:
        self._blurt(who, data)

    def _blurt(self, who: int, data: bytes) -> None:
        """Send bytes and nothing more: whatever the service says, it comes to an end."""
        client = self.client(who)
        with contextlib.suppress(OSError):
            client.socket.sendall(data)
            client.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError, ProtocolError):
            while (answer := client.channel.receive()) is not None:
                assert answer.type >= Type.WELCOME
                if answer.type is Type.REFUSED:
                    assert answer.fields()["code"] != "internal", answer.fields()
        self.forget(who)

    # What holds all the time. ---------------------------------------------------------------------

    @invariant()
    def memory_is_as_it_was_left(self) -> None:
        for client in self.clients:
            for start, held in client.grants.items() if client else ():
                found = client.dram[start : start + len(held)]
                for part in (slice(0, 4096), slice(-4096, None), slice(None, None, 4099)):
                    assert (found[part] == held[part]).all()

    @invariant()
    def figures_agree(self) -> None:
        here = {f"client {n}": c for n, c in enumerate(self.clients) if c}

        def agree() -> bool:
            found = self.control.figures()
            held = {each["name"]: each["memory_bytes"] for each in found["contexts"]}
            assert found["problems"] == []
            return held == {name: client.held for name, client in here.items()} and (
                found["memory_bytes"] == sum(held.values())
            )

        eventually(agree)  # those that have ended go at once, but not before we look

    def teardown(self) -> None:
        for who, client in enumerate(self.clients):
            if client:
                self.forget(who)
        eventually(lambda: not self.control.figures()["contexts"])
        assert self.control.figures()["memory_bytes"] == 0


def test_no_client_harms_another(tmp_path):
    path = tmp_path / "s"
    with serving(path) as service:
        control = Connection(path, "control")
        here = type("TenantsHere", (Tenants,), dict(path=path, control=control))
        few = settings(max_examples=15, stateful_step_count=30, deadline=None)
        run_state_machine_as_test(here, settings=few)
        control.close()
        assert service.poll() is None


FUZZ = """
import atheris, sys
with atheris.instrument_imports(include=["pagoda.runtime.service"]):
    from pagoda.runtime.service import launches, protocol
def decode(data):
    kind = list(protocol.Type)[data[0] % len(protocol.Type)] if data else protocol.Type.HELLO
    for read in (lambda: protocol.unpack(kind, data[1:]), lambda: launches.unpack_launch(data),
                 lambda: launches.unpack_result(data, (), True)):
        try:
            read()
        except protocol.ProtocolError:
            pass
atheris.Setup([sys.argv[0], "-runs={runs}", "-max_len=4096", "-rss_limit_mb=4096"], decode)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_decoders_raise_nothing_else():
    pytest.importorskip("atheris")
    runs = int(os.environ.get("PAGODA_FUZZ_PROGRAMS", "1000000"))
    found = subprocess.run(
        [sys.executable, "-c", FUZZ.format(runs=runs)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    assert f"Done {runs} runs" in found.stderr
