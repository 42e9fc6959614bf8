"""Fetching URLs that untrusted users name, without giving them access to the local network."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5
TIMEOUT_SECONDS = 20.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# One message for private addresses and for servers that do not answer, so that it reveals nothing about the local network.
_UNREACHABLE = "its server is not on the public internet, or does not answer"


class FetchError(ValueError):
    """A URL could not be fetched: the reason, without details of this machine or its network.

    `__cause__` may hold such details.
    """


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: not on this host or a private network, nor a tunnel into one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.sixtofour is not None or ip.teredo is not None:
            return False
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch_url(url: str, max_bytes: int, seconds: float = TIMEOUT_SECONDS) -> bytes:
    """Fetch a public http(s) URL.

    A host name is resolved once. All its addresses must be public, and only these are connected to, which prevents DNS
    rebinding. Redirects (5 at most) are checked in the same way. The proxies of the environment are not used, as the
    addresses behind a proxy cannot be checked.

    Args:
        url (`str`): An http(s) URL without user name and password.
        max_bytes (`int`): The largest response body.
        seconds (`float`, *optional*, defaults to 20.0): The time limit, including name resolution.

    Raises:
        FetchError: If the URL is refused, cannot be fetched, or exceeds a limit.
    """
    # In a separate thread, because name resolution cannot be cancelled.
    request = _Request(url, max_bytes, time.monotonic() + seconds)
    request.start()
    request.join(max(seconds, 0.0))
    if request.is_alive():
        request.cancel()
        raise FetchError("it took too long")
    if request.error is not None:
        raise request.error
    return request.body


class _Request(threading.Thread):
    """Follows redirects to a response; sets `body` or `error`."""

    def __init__(self, url: str, max_bytes: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.url, self.max_bytes, self.deadline = url, max_bytes, deadline
        self.body = b""
        self.error: Exception | None = None
        self._socket: socket.socket | None = None

    def run(self) -> None:
        try:
            url = self.url
            for _ in range(MAX_REDIRECTS + 1):
                location = self._get(url)
                if location is None:
                    return
                url = urljoin(url, location)
            raise FetchError(f"it redirects more than {MAX_REDIRECTS} times")
        except Exception as error:  # raised in the caller's thread
            self.error = error

    def cancel(self) -> None:
        """Interrupt a blocking read; the thread then ends at its next check of the deadline."""
        if self._socket is not None:
            with suppress(OSError):  # already closed
                self._socket.shutdown(socket.SHUT_RDWR)

    def _get(self, url: str) -> str | None:
        """Read the body, or return the location of a redirect."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise FetchError("it is no valid URL") from error
        if parts.scheme not in ("http", "https") or not host:
            raise FetchError("it is no http(s) URL")
        if parts.username is not None or parts.password is not None:
            raise FetchError("it holds a user name or a password")
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port or 443, context=context)
        else:
            context = None
            connection = http.client.HTTPConnection(host, port or 80)
        try:
            connection.sock = self._connect(host, connection.port)
            if context is not None:  # the handshake is separate, so that `cancel` can close the socket during it
                encrypted = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
                self._socket = connection.sock = encrypted
                encrypted.do_handshake()
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "image/*, video/*", "Accept-Encoding": "identity", "User-Agent": "dsvl"}
            connection.request("GET", path, headers=headers)
            return self._read(connection.getresponse())
        except FetchError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise FetchError("its server's certificate is not valid for it") from error
        except TimeoutError as error:
            raise FetchError("it took too long") from error
        except (ValueError, http.client.InvalidURL) as error:  # invalid characters
            raise FetchError("it is no valid URL") from error
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(_UNREACHABLE) from error
        finally:
            connection.close()

    def _connect(self, host: str, port: int) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not found or not all(is_public(str(entry[4][0])) for entry in found):
            raise FetchError(_UNREACHABLE)
        failure: OSError | None = None
        for index, (family, kind, protocol, _, address) in enumerate(found):
            self._socket = connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self._remaining() / (len(found) - index))  # share the time among the addresses
                connection.connect(address)
                connection.settimeout(self._remaining())
                return connection
            except OSError as error:
                connection.close()
                failure = error
        assert failure is not None
        raise failure

    def _read(self, response: http.client.HTTPResponse) -> str | None:
        if response.status in (301, 302, 303, 307, 308):
            location = response.getheader("Location")
            if location is None:
                raise FetchError("it redirects nowhere")
            return location
        if response.status != 200:
            raise FetchError(f"its server answers with status {response.status}")
        body = bytearray()
        while chunk := response.read1(2**16):
            body += chunk
            if len(body) > self.max_bytes:
                raise FetchError(f"it is larger than {self.max_bytes:,} bytes")
            self._remaining()
        if response.length:
            raise FetchError("its server broke off")
        self.body = bytes(body)
        return None

    def _remaining(self) -> float:
        """Seconds until the deadline."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise FetchError("it took too long")
        return remaining
