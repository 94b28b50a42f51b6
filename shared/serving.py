"""What the tools that serve HTTP have in common: where they listen, and whom that address lets in."""

from __future__ import annotations

import ipaddress
import socket

from tuneutils.shared.errors import ExitCode, ToolError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, allow_remote: bool) -> bool:
    """Whether other machines reach the address.

    Raises:
        ToolError: they do, and that is not allowed (2).
    """
    remote = not is_loopback(host)
    if remote and not allow_remote:
        raise ToolError(
            f"--host {host}: other machines could reach it; add --allow-remote if that is meant",
            code=ExitCode.USAGE,
        )
    return remote


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ToolError: the address or port cannot be had (69).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(512)
    except OSError as exc:
        listening.close()
        raise ToolError(
            f"--host {host} --port {port}: {(exc.strerror or str(exc)).lower()}; try another --port",
            code=ExitCode.UNAVAILABLE,
        ) from exc
    return listening


def url_of(scheme: str, listening: socket.socket, host: str) -> str:
    """The address as a URL, an IPv6 one in brackets."""
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{listening.getsockname()[1]}"
