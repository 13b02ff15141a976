"""Messages of the device service: round trips, and what no message can do to the service."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from service_support import TINY, eventually, figures, serving

from pagoda import __version__
from pagoda.isa import (
    CONTRACT_VERSION,
    PRESETS,
    Counters,
    Fault,
    FaultKind,
    Launch,
    Program,
    Result,
    Slot,
)
from pagoda.runtime import ServiceError
from pagoda.runtime.service import remote
from pagoda.runtime.service.launches import (
    Outcome,
    pack_chip,
    pack_launch,
    pack_result,
    unpack_chip,
    unpack_launch,
    unpack_result,
)
from pagoda.runtime.service.protocol import (
    HEADER,
    MAGIC,
    MAX_BODY_BYTES,
    VERSION,
    Channel,
    ProtocolError,
    Type,
    pack,
    unpack,
)
from pagoda.runtime.service.remote import Connection

HELLO = pack(Type.HELLO, contract=CONTRACT_VERSION, pagoda=__version__, name="test")
OPEN = pack(Type.OPEN, cores=None, priority=0, time_share=None, memory_limit=None)
WORDS = st.integers(0, (1 << 32) - 1)
ADDRESSES = st.integers(0, (1 << 40) - 1)
SLOTS = st.builds(Slot, ADDRESSES.map(lambda n: n // 64 * 64), WORDS, st.booleans(), st.booleans())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("service") / "device.sock"
    with serving(path):
        yield path


def message(kind: int, body: bytes = b"", number: int = 1, version: int = VERSION) -> bytes:
    return HEADER.pack(MAGIC, version, kind, len(body), number) + body


@given(st.lists(WORDS, max_size=9), st.lists(SLOTS, max_size=64), st.booleans(), ADDRESSES, WORDS)
def test_launches_round_trip(args, slots, tracing, watchdog, number):
    launch = Launch(Program("p", bytes(4)), tuple(args), tuple(slots), watchdog + 1)
    packed = unpack_launch(pack_launch(number, tracing, launch))
    assert (packed.program, packed.tracing) == (number, tracing)
    assert (packed.args, packed.slots, packed.watchdog) == (
        launch.args, launch.slots, launch.watchdog
    )  # fmt: skip


@given(
    st.integers(0, 1 << 62),
    st.lists(st.integers(0, 1 << 62), min_size=9, max_size=9),
    st.none()
    | st.builds(Fault, st.sampled_from(FaultKind), *[st.integers(-1, 1 << 40)] * 6, st.text()),
)
def test_results_round_trip(cycles, sums, fault):
    result = Result(cycles, fault, Counters(*sums[:5], tuple(sums[5:])))
    body, fd = pack_result(Outcome.FINISHED, result)
    assert fd is None
    assert unpack_result(body, (), False) == (Outcome.FINISHED, result)


@pytest.mark.parametrize("name", PRESETS)
def test_chips_round_trip(name):
    assert unpack_chip(pack_chip(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize(
    ("kind", "body", "problem"),
    [
        (Type.GRANT, b"\xc1", "GRANT: the body is no msgpack"),
        (Type.GRANT, b"", "GRANT: the body is no msgpack"),
        (Type.STOP, b"\x01", "STOP: its fields must be exactly these: none"),
        (Type.GRANT, b"\x81\xa5bytes\x01", "its fields must be exactly these: bytes, release"),
        (
            Type.GRANT,
            b"\x82\xa5bytes\xff\xa7release\x90",
            "field 'bytes' is out of range or of another type",
        ),
        (Type.GRANT, b"\x82\xa5bytes\xc3\xa7release\x90", "field 'bytes' is out of range"),
        (Type.RELEASE, b"\x81\xa7release\x91\x92\x01\xc0", "field 'release' is out of range"),
        (Type.OPEN, OPEN[:-1] + b"\xa1x", "field 'memory_limit' is out of range"),
    ],
)
def test_bodies_are_checked(kind, body, problem):
    with pytest.raises(ProtocolError, match=re.escape(problem)):
        unpack(kind, body)


@given(st.sampled_from(list(Type)), st.binary(max_size=60))
def test_any_body_is_told_apart(kind, body):
    with contextlib.suppress(ProtocolError):
        unpack(kind, body)
    with contextlib.suppress(ProtocolError):
        unpack_launch(body)
    with contextlib.suppress(ProtocolError):
        unpack_result(body, (), True)


@given(st.lists(st.tuples(st.sampled_from(list(Type)), st.binary(max_size=400)), max_size=5),
       st.lists(st.integers(1, 50), min_size=1, max_size=20))  # fmt: skip
def test_messages_arrive_however_they_are_cut(messages, cuts):
    data = b"".join(message(kind, body, n) for n, (kind, body) in enumerate(messages))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, sent = Channel(theirs), 0

        def send() -> None:
            nonlocal sent
            turn = 0
            while sent < len(data):
                cut = cuts[turn % len(cuts)]
                ours.sendall(data[sent : sent + cut])
                sent, turn = sent + cut, turn + 1
            ours.shutdown(socket.SHUT_WR)

        send()
        for number, (kind, body) in enumerate(messages):
            found = channel.receive()
            assert (found.type, found.number, found.body) == (kind, number, body)
        assert channel.receive() is None


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a message begins with b'GET '; it must begin with b'PGDA'"),
        (HEADER.pack(MAGIC, VERSION, 99, 0, 1), "there is no message of type 99"),
        (HEADER.pack(MAGIC, VERSION, 1, MAX_BODY_BYTES + 1, 1), f"at most {MAX_BODY_BYTES} are"),
        (message(Type.STATUS)[:9], "the connection ended within a message"),
        (HEADER.pack(MAGIC, VERSION, 1, 50, 1) + b"x", "the connection ended within a message"),
    ],
)
def test_broken_messages(data, problem):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError, match=re.escape(problem)):
            Channel(theirs).receive()


def _answers(path, data: bytes) -> list:
    """What the service says to raw bytes; when it says no more, the connection is closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.connect(str(path))
        raw.settimeout(0.05)
        channel, found = Channel(raw), []
        with contextlib.suppress(OSError):  # it hangs up, or waits for more
            raw.sendall(data)
            while (answer := channel.receive()) is not None:
                found.append(answer)
        return found


LAUNCH_BODY = pack_launch(0, False, Launch(Program("p", bytes(4)), (1, 2), (Slot(0, 64),)))
VALID = [
    (Type.GRANT, pack(Type.GRANT, bytes=1 << 20, release=[])),
    (Type.RELEASE, pack(Type.RELEASE, release=[[0, 2 << 20]])),
    (Type.PROGRAM, pack(Type.PROGRAM, name="p", code=bytes(8), entry=0, stack_limit=0)),
    (Type.LAUNCH, LAUNCH_BODY),
    (Type.RESUME, pack(Type.RESUME)),
    (Type.STATUS, pack(Type.STATUS)),
    (Type.OPEN, OPEN),
    (Type.HELLO, HELLO),
]


@st.composite
def conversations(draw) -> bytes:
    """Messages in any order, most of them valid, some with bytes changed, cut off at the end."""
    data = message(Type.HELLO, HELLO) + message(Type.OPEN, OPEN)
    for kind, body in draw(st.lists(st.sampled_from(VALID), max_size=8)):
        data += message(kind, body, draw(WORDS))
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        changed[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(1, len(data)))] + draw(st.binary(max_size=20)))


@settings(max_examples=80)
@given(conversations())
@example(message(Type.HELLO, HELLO) + message(Type.LAUNCH, LAUNCH_BODY))
@example(message(Type.HELLO, HELLO) + message(Type.OPEN, OPEN) + message(Type.REFUSED, b"\x80"))
def test_no_conversation_harms_the_service(path, data):
    for answer in _answers(path, data):
        assert answer.type >= Type.WELCOME
        if answer.type is Type.REFUSED:
            assert answer.fields()["code"] in (
                "protocol", "version", "slot", "launch", "memory", "limit", "chip"
            )  # fmt: skip


def test_the_service_answers_after_all_that(path):
    found = figures(path)
    assert found["chip"] == pack_chip(TINY)
    assert found["problems"] == []


def test_what_a_broken_conversation_leaves(path):
    eventually(lambda: not figures(path)["contexts"])
    data = message(Type.HELLO, HELLO) + message(Type.OPEN, OPEN)
    data += message(Type.GRANT, pack(Type.GRANT, bytes=100 << 20, release=[]))
    kinds = [answer.type for answer in _answers(path, data + b"garbage beyond any header")]
    assert kinds == [Type.WELCOME, Type.OPENED, Type.GRANTED, Type.REFUSED]
    eventually(lambda: not figures(path)["contexts"])
    assert figures(path)["memory_bytes"] == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            message(Type.HELLO, HELLO, version=VERSION + 1),
            (
                "the device service on {path} is Pagoda {pagoda} and speaks protocol version 1, "
                "this program speaks version 2; {remedy}"
            ),
        ),
        (
            message(Type.HELLO, pack(Type.HELLO, contract=99, pagoda="9.9", name="")),
            (
                "the device service on {path} is Pagoda {pagoda} (contract version {contract}), "
                "this program is Pagoda 9.9 (contract version 99); {remedy}"
            ),
        ),
    ],
)
def test_the_service_refuses_other_versions(path, data, text):
    (answer,) = _answers(path, data)
    assert answer.fields() == dict(
        code="version",
        text=text.format(
            path=path,
            pagoda=__version__,
            contract=CONTRACT_VERSION,
            remedy=_remedy(figures(path)["pid"]),
        ),
    )


def _remedy(pid: int) -> str:
    return (
        f"run both from the same installation: end the service (kill {pid}) and start it again, or "
        "set PAGODA_DEVICE=embedded to do without"
    )


def _impostor(path, reply: bytes) -> None:
    """Listens on a socket and gives the first client one answer."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connected:
            connected.recv(1 << 16)
            connected.sendall(reply)

    threading.Thread(target=serve, daemon=True).start()


def _welcome(**changed: object) -> bytes:
    fields = dict(
        contract=CONTRACT_VERSION, pagoda=__version__, pid=os.getpid(), chip=pack_chip(TINY)
    )
    return pack(Type.WELCOME, **(fields | changed))


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (
            message(Type.WELCOME, _welcome(), version=7),
            (
                "the device service on {path} speaks protocol version 7, this program (Pagoda "
                "{pagoda}) speaks version 1; {remedy}"
            ),
        ),
        (
            message(Type.WELCOME, _welcome(pagoda="9.9")),
            (
                "the device service on {path} is Pagoda 9.9 (contract version {contract}), this "
                "program is Pagoda {pagoda} (contract version {contract}); {remedy}"
            ),
        ),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            (
                "device service on {path}: what answers there is none (a message begins with "
                "b'HTTP'; it must begin with b'PGDA'); check the path"
            ),
        ),
        (
            b"",
            (
                "device service on {path}: what answers there is none (the connection ended); "
                "check the path"
            ),
        ),
    ],
)
def test_a_client_refuses_what_is_no_service(tmp_path, reply, text):
    path = tmp_path / "s"
    _impostor(path, reply)
    with pytest.raises(ServiceError) as raised:
        Connection(path)
    assert str(raised.value) == text.format(
        path=path, pagoda=__version__, contract=CONTRACT_VERSION, remedy=_remedy(os.getpid())
    )


def test_a_client_waits_for_nobody_forever(tmp_path, monkeypatch):
    """Neither in the queue of a service that accepts nobody, nor for one that says nothing."""
    monkeypatch.setattr(remote, "_ANSWER_SECONDS", 1)
    path, waiting = tmp_path / "s", []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with pytest.raises(ServiceError) as raised:
            Connection(path)
        remedy = (
            "end it and start the service again, check the path, or set PAGODA_DEVICE=embedded to "
            "do without"
        )
        assert str(raised.value) == (
            f"device service on {path}: process {os.getpid()} has not answered for 1 s; {remedy}"
        )
        with contextlib.suppress(BlockingIOError):
            while len(waiting) < 9:  # the queue is full before
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(path))
        with pytest.raises(ServiceError) as raised:
            Connection(path)
        assert str(raised.value) == (
            f"device service on {path}: it has accepted nobody for 1 s; {remedy}"
        )
    for each in waiting:
        each.close()


def test_a_crowd_is_told_so(tmp_path):
    """And who owns the service gets in all the same."""
    path = tmp_path / "s"
    before = "from pagoda.runtime.service import server\nserver._MAX_CONNECTIONS = 2"
    before += "\nserver._MOST_FOR_OWNER = 3"
    text = (
        f"the device service on {path} has 3 connections, and takes no more; try again when other "
        "programs have ended"
    )
    with serving(path, before=before), contextlib.ExitStack() as stack:
        for _ in range(3):  # one that has just ended may count for a moment
            kept = stack.enter_context(eventually(lambda: _if_welcome(path)))
        with pytest.raises(ServiceError) as raised:
            Connection(path)
        assert str(raised.value) == text
        kept.close()
        stack.enter_context(eventually(lambda: _if_welcome(path)))


def _if_welcome(path) -> Connection | None:
    with contextlib.suppress(ServiceError):
        return Connection(path)
