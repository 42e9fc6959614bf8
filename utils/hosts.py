"""Loopback addresses, for the servers of `dsvl demo` and `dsvl serve`."""

import ipaddress

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")  # Host headers that a server on this machine accepts


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this host can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
