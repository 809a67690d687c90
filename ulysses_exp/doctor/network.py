"""Interfaces and ports, and what a launcher has left in the environment."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping

from ulysses_exp.doctor.finding import Asked, Finding, ok, warning, wrong

_RESOLVE_SECONDS = 3.0
#: What torchrun and Slurm tell ranks. Left over in a shell, it makes other programs wait for ranks that are not there.
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")


def check(asked: Asked) -> Iterator[Finding]:
    """Whether ranks can meet: here over loopback, on several machines by name."""
    yield _loopback()
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if (named := asked.environment.get(variable)) is not None:
            yield _interface(variable, named)
    yield _own_name(asked.config.launch.name == "local")
    yield _leftovers(asked.environment, asked.config.launch.name)


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client, server.accept()[0] as accepted:
                accepted.sendall(b"here")
                good = client.recv(4) == b"here"
    except OSError as error:
        return wrong("loopback", f"127.0.0.1 does not work: {error}", "ip link set lo up")
    return ok("loopback", "127.0.0.1 works") if good else wrong("loopback", "127.0.0.1 loses bytes", "see ip addr")


def _interface(variable: str, named: str) -> Finding:
    """gloo takes names; nccl beginnings of names, `=` before exact ones, `^` before those to leave out."""
    present = [name for _, name in socket.if_nameindex()]
    exact = variable.startswith("GLOO") or named.startswith(("=", "^="))
    names = [n.strip() for n in named.lstrip("^=").split(",")]
    missing = [n for n in names if not any(p == n if exact else p.startswith(n) for p in present)]
    if named.startswith("^") or not missing:
        return ok(variable, named)
    return wrong(variable, f"{', '.join(map(repr, missing))}: no such interface",
                 f"unset {variable}, or one of {', '.join(present)}")  # fmt: skip


def _own_name(local: bool) -> Finding:
    name, found = socket.gethostname(), []

    def look() -> None:
        with contextlib.suppress(OSError):
            found.append(socket.gethostbyname(name))

    thread = threading.Thread(target=look, daemon=True)  # a name server that does not answer takes its time
    thread.start()
    thread.join(_RESOLVE_SECONDS)
    if found:
        return ok("host name", f"{name} is {found[0]}")
    mend = f"a line for {name} in /etc/hosts; ranks of one machine do without"
    return warning("host name", f"{name} does not resolve", mend) if not local else ok(
        "host name", f"{name} does not resolve; only ranks on several machines need it"
    )  # fmt: skip


def _leftovers(environment: Mapping[str, str], launch: str) -> Finding:
    found = [f"{name}={environment[name]}" for name in _OF_A_LAUNCHER if name in environment]
    if launch == "attached":
        return ok("launcher", ", ".join(found) or "Slurm's")
    if not found:
        return ok("launcher", "nothing left over in the environment")
    names = " ".join(text.partition("=")[0] for text in found)
    return warning("launcher", f"{', '.join(found)}: launch={launch} ignores them", f"unset {names}")
