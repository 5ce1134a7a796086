"""A process listens where it is told, and where others can reach it."""

from __future__ import annotations

import contextlib
import socket

import pytest

from jaxsft.run import sockets

OWN = "192.0.2.1"  # in the tests, an address of this machine's; 198.51.100.1 is another's
NAMES = {
    "localhost": ["127.0.0.1", "::1"],
    "here": [OWN],
    "debian": ["127.0.1.1"],  # as /etc/hosts there calls the machine itself
    "both": [OWN, "127.0.1.1"],
    "outside": ["198.51.100.1"],  # a public address, translated
    "half": [OWN, "198.51.100.1"],
    "two": [OWN, "fd00::2"],
}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", ["127.0.0.1", "::1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("127.0.1.1", ["127.0.1.1"]),
        ("here", [OWN]),
        (OWN, [OWN]),
        ("two", [OWN, "fd00::2"]),
        ("debian", []),
        ("both", []),
        ("outside", []),
        ("198.51.100.1", []),
        ("half", []),
        ("unknown", []),
    ],
)
def test_what_a_name_says_of_where_to_listen(monkeypatch, host: str, expected: list[str]) -> None:
    def resolve(name: str, *_: object, **__: object) -> list[tuple]:
        if name == "unknown":
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in NAMES.get(name, [name])]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(sockets, "is_here", lambda name: not name.startswith("198."))
    assert sockets.named_addresses(host) == expected


def test_who_is_told_the_loopback_is_reached_by_nothing_else() -> None:
    """And one that listens everywhere is, in both of IP's versions where the machine has them."""
    assert sockets.is_here("127.0.0.1")
    assert not sockets.is_here("198.51.100.1")
    for names, reached in ((["127.0.0.1"], False), (sockets.EVERYWHERE, True)):
        with contextlib.ExitStack() as stack:
            port = sockets.free_port()
            servers = [stack.enter_context(server) for server in sockets.listen(names, port, 1)]
            assert {server.getsockname()[1] for server in servers} == {port}
            for address in ["127.0.0.2", *(["::1"] if sockets.is_here("::1") else [])]:
                if reached:
                    socket.create_connection((address, port), timeout=5).close()
                else:
                    with pytest.raises(ConnectionRefusedError):
                        socket.create_connection((address, port), timeout=5)


def test_a_port_that_is_taken_is_told_and_nothing_stays_open() -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            sockets.listen(["127.0.0.1", "127.0.0.2"], port, 1)
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(("host", "expected"), [("a", "a:1"), ("10.0.0.1", "10.0.0.1:1"), ("::1", "[::1]:1")])
def test_an_address_is_written_with_its_port(host: str, expected: str) -> None:
    assert sockets.address(host, 1) == expected
