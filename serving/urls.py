"""Fetching what a stranger's address names, without becoming the stranger's hand in this network."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urljoin, urlsplit

REDIRECTS = 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressError(ValueError):
    """What may be told to whoever named the address."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not of this machine, this network, or a tunnel into either."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(url: str, max_bytes: int = 16 * 2**20, seconds: float = 10.0) -> bytes:
    """The bytes behind a public http(s) address.

    The name is resolved once, every address that it has must be public, and the connection goes to one of those: a name that
    changes in between gains nothing. Redirects are followed (3 at most), each checked in the same way. The environment's
    proxies are not used: behind one, nothing could be checked.

    Args:
        url: an http(s) address without user name and password.
        max_bytes: of the body.
        seconds: for everything together, the resolution of names excepted.

    Raises:
        AddressError: with a message that tells nothing of this network.
    """
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        body, onward = _get(url, max_bytes, deadline)
        if onward is None:
            return body
        url = urljoin(url, onward)
    raise AddressError(f"it redirects more than {REDIRECTS} times")


def _get(url: str, max_bytes: int, deadline: float) -> tuple[bytes, str | None]:
    """The body, or where it is to be found instead."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise AddressError("it is no valid address") from None
    if parts.scheme not in ("http", "https") or not host:
        raise AddressError("it is no http(s) address")
    if parts.username is not None or parts.password is not None:
        raise AddressError("it holds a user name or a password")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    sockets: list[socket.socket] = []
    guard: threading.Timer | None = None
    try:
        sock = _connect(host, port or {"http": 80, "https": 443}[parts.scheme], deadline)
        # A timeout of the socket is for one packet; a server that sends them one by one is cut off by this.
        sockets.append(sock)
        guard = threading.Timer(max(deadline - time.monotonic(), 0.0), _shut, [sockets])
        guard.daemon = True
        guard.start()
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sockets.append(context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False))
            sockets[-1].do_handshake()  # type: ignore[attr-defined]
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sockets[-1]
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "dsvl"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            onward = response.getheader("Location")
            if onward is None:
                raise AddressError("it redirects nowhere")
            return b"", onward
        if response.status != 200:
            raise AddressError(f"its server answered with status {response.status}")
        body = response.read(max_bytes + 1)
        if len(body) > max_bytes:
            raise AddressError(f"it is larger than {max_bytes:,} bytes")
        if time.monotonic() > deadline or response.length:  # cut off
            raise AddressError("it took too long")
        return body, None
    except AddressError:
        raise
    except (OSError, http.client.HTTPException, UnicodeError, ValueError):
        raise AddressError("its server cannot be reached or does not answer") from None
    finally:
        if guard is not None:
            guard.cancel()
        for one in sockets:
            one.close()


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(is_public(str(address)) for address in addresses):
        raise AddressError("its server cannot be reached or does not answer")  # the same words: nobody maps this network
    left = deadline - time.monotonic()
    if left <= 0:
        raise AddressError("it took too long")
    return socket.create_connection((str(addresses[0]), port), timeout=left)


def _shut(sockets: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # it was closed in the meantime
        sockets[-1].shutdown(socket.SHUT_RDWR)
