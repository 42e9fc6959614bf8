"""Fetching a picture from an address that somebody typed, without becoming their way into this network."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5
SECONDS = 20.0
_REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, however it is wrapped."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        low = int(ip) & 0xFFFFFFFF
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None,))[-1]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(low)
        if inner is not None and not is_public(str(inner)):
            return False
    return ip.is_global and not ip.is_multicast


def _public_socket(host: str, port: int, timeout: float | None) -> socket.socket:
    """Connect to the very address that was checked: a second look-up might give another.

    Raises:
        ValueError: if the host has an address that is not public.
        OSError: if none of them answers.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(str(entry[4][0])) for entry in found):
        raise ValueError(f"{host} is not on the public internet.")
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure or OSError(f"{host} has no address.")


class _Plain(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _public_socket(self.host, self.port, self.timeout)


class _Encrypted(http.client.HTTPSConnection):
    def connect(self) -> None:
        plain = _public_socket(self.host, self.port, self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


class _Fetch(threading.Thread):
    """In a thread of its own, so that no name server or trickle of bytes holds the caller up."""

    def __init__(self, url: str, max_bytes: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.url, self.max_bytes, self.deadline = url, max_bytes, deadline
        self.body: bytes | None = None
        self.error: Exception | None = None
        self.connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        try:
            self.body = self._follow()
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.error = error

    def _follow(self) -> bytes:
        url = self.url
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
                raise ValueError(f"{url[:200]} is not a plain http(s) address.")
            kind = _Plain if parts.scheme == "http" else _Encrypted
            self.connection = connection = kind(parts.hostname, parts.port, timeout=self._left())
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"User-Agent": "dsvl", "Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status not in _REDIRECTS:
                    return self._read(response)
                url = urljoin(url, response.headers.get("Location", ""))
            finally:
                connection.close()
        raise ValueError(f"there are more than {MAX_REDIRECTS} redirections.")

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over.")
        return left

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise ValueError(f"the server answers {response.status} {response.reason}.")
        body = bytearray()
        while chunk := response.read1(2**16):
            body += chunk
            if len(body) > self.max_bytes:
                raise ValueError(f"it has more than {self.max_bytes:,} bytes.")
            self._left()
        return bytes(body)


def fetch(url: str, max_bytes: int, seconds: float = SECONDS) -> bytes:
    """The bytes behind an http(s) address on the public internet. Proxies of the environment are not used.

    Every redirection is checked as the address itself is; nothing is sent but the request.

    Args:
        url: the address, without user name or password.
        max_bytes: the longest body.
        seconds: in all, look-up and redirections included.

    Raises:
        ValueError: if it is refused, or cannot be had within these bounds.
    """
    thread = _Fetch(url, max_bytes, time.monotonic() + seconds)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        sock = getattr(thread.connection, "sock", None)
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        raise ValueError(f"The picture {url[:200]} did not come within {seconds:g} seconds.")
    if thread.body is None:
        raise ValueError(f"The picture {url[:200]} cannot be fetched: {thread.error}")
    return thread.body
