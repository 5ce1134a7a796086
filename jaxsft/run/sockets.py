"""Where a process listens, and what it is reached by."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

EVERYWHERE = ("0.0.0.0", "::")  # at all addresses of this machine


def address(host: str, port: int) -> str:
    """HOST:PORT, in brackets a host that has colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def named_addresses(host: str) -> list[str]:
    """The addresses of this machine that `host` names; none where process 0 had better listen at all that it has.

    So it is where others reach it by an address that it does not have (a public one, translated; a container's host),
    and where a machine's own name leads to its loopback, as in Debian's /etc/hosts: nobody else would come there.
    """
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []
    here = [name for name in found if is_here(name)]
    if host == "localhost":
        return here
    is_loopback = any(ipaddress.ip_address(name).is_loopback for name in found)
    return here if here == found and (found == [host] or not is_loopback) else []


def is_here(name: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        listen([name], 0, 1)[0].close()
    except OSError:
        return False
    return True


def listen(names: Sequence[str], port: int, backlog: int) -> list[socket.socket]:
    """A socket that listens at `port` of each of these addresses; IPv6's are left out where the machine has none.

    Raises:
      OSError: that can't be.
    """
    servers: list[socket.socket] = []
    try:
        for name in names:
            family = socket.AF_INET6 if ":" in name else socket.AF_INET
            try:
                servers.append(socket.create_server((name, port), family=family, backlog=backlog))
            except OSError as error:
                if not servers or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except OSError:
        for server in servers:
            server.close()
        raise
    return servers


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
