"""The ring of bytes between two ranks of a node: order, sizes beyond the ring, and what waits."""

from __future__ import annotations

import random

import pytest

from mpiddp.transport.mailbox import RING_NBYTES, Inbox, NodePort, Outbox


def ring() -> tuple[Outbox, Inbox]:
    memory = memoryview(bytearray(RING_NBYTES))
    return Outbox(memory), Inbox(memory)


def everything(inbox: Inbox) -> list[bytes]:
    found = []
    while (message := inbox.poll()) is not None:
        found.append(message)
    return found


def test_messages_come_whole_and_in_order() -> None:
    outbox, inbox = ring()
    assert inbox.poll() is None
    messages = [b"", b"a", b"bc" * 100, b""]
    assert all(outbox.send(message) for message in messages)
    assert everything(inbox) == messages
    assert inbox.poll() is None


@pytest.mark.parametrize("nbytes", [0, 1, 8, 65528 - 8, 65536 - 8, 65536, 65537, 200_001])
def test_any_size_goes_through(nbytes: int) -> None:
    outbox, inbox = ring()
    message = random.Random(nbytes).randbytes(nbytes)
    outbox.send(b"before")
    outbox.send(message)
    outbox.send(b"after")
    found = everything(inbox)
    while not outbox.flush() or len(found) < 3:
        found += everything(inbox)
    assert found == [b"before", message, b"after"]


def test_a_full_ring_keeps_what_does_not_fit_and_tells() -> None:
    outbox, inbox = ring()
    assert outbox.send(bytes(60_000))
    assert not outbox.send(bytes(10_000))
    assert not outbox.send(b"small, but behind the other one")
    assert not outbox.flush()
    assert inbox.poll() == bytes(60_000)
    assert outbox.flush()
    assert everything(inbox) == [bytes(10_000), b"small, but behind the other one"]


@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving(seed: int) -> None:
    draw = random.Random(seed)
    outbox, inbox = ring()
    sent, received = [], []
    for _ in range(400):
        if draw.random() < 0.5:
            sent.append(draw.randbytes(draw.choice((0, 3, 8, 500, 9_000, 70_000))))
            outbox.send(sent[-1])
        elif draw.random() < 0.5:
            outbox.flush()
        elif (message := inbox.poll()) is not None:
            received.append(message)
    while len(received) < len(sent):
        outbox.flush()
        received += everything(inbox)
    assert received == sent


class Beyond:
    """A port whose messages arrive at once."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.arrived: list[tuple[int, bytes]] = []
        self.leaving = False

    def send(self, peer: int, message: bytes) -> None:
        self.sent.append((peer, message))
        self.leaving = True

    def poll(self) -> tuple[int, bytes] | None:
        return self.arrived.pop(0) if self.arrived else None

    def flush(self) -> None:
        self.leaving = False


def test_a_port_takes_the_ring_to_some_peers_and_the_other_port_to_the_rest() -> None:
    (up, coordinator_in), (coordinator_out, down) = ring(), ring()
    beyond = Beyond()
    port = NodePort(beyond, {1: coordinator_in}, {1: coordinator_out})
    port.send(1, b"to the node")
    assert (down.poll(), beyond.sent, port.leaving) == (b"to the node", [], False)
    port.send(2, b"to another node")
    assert (beyond.sent, port.leaving) == ([(2, b"to another node")], True)
    port.flush()
    assert not port.leaving
    up.send(b"from the node")
    beyond.arrived.append((2, b"from another node"))
    assert [port.poll(), port.poll(), port.poll()] == [(1, b"from the node"), (2, b"from another node"), None]


def test_a_port_with_a_full_ring_is_leaving_until_the_peer_has_read() -> None:
    (_, coordinator_in), (coordinator_out, down) = ring(), ring()
    port = NodePort(Beyond(), {1: coordinator_in}, {1: coordinator_out})
    port.send(1, bytes(100_000))
    assert port.leaving
    assert down.poll() is None  # a part of it
    port.flush()
    assert (port.leaving, down.poll()) == (False, bytes(100_000))
