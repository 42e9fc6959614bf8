"""Fetching what somebody's address names, without becoming that somebody's hand in this network."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

REDIRECTS = 5
SECONDS = 20.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# The same words for what is not there and for what may not be reached, so that nobody maps this network by them.
_UNREACHABLE = "its server is not on the public internet, or does not answer"


class AddressError(ValueError):
    """Why an address was not fetched, in words for whoever named it: nothing of this machine or its network.

    The cause (`__cause__`), where there is one, says more.
    """


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not of this machine, this network, or a tunnel into either."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.sixtofour is not None or ip.teredo is not None:
            return False
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(url: str, max_bytes: int, seconds: float = SECONDS) -> bytes:
    """The bytes behind a public http(s) address.

    A name is looked up once, all addresses that it has must be public, and those are connected to: a name that changes in
    between gains nothing. Redirections (5 at most) are checked as the address itself is. The environment's proxies are not
    used: behind one, nothing could be checked.

    Args:
        url: the address, without user name or password.
        max_bytes: of the body.
        seconds: for all of it, looking names up included.

    Raises:
        AddressError: if it is refused, or cannot be had within these bounds.
    """
    # In a thread of its own, as nothing ends the system's look-up of a name.
    visit = _Visit(url, max_bytes, time.monotonic() + seconds)
    visit.start()
    visit.join(max(seconds, 0.0))
    if visit.is_alive():
        visit.abandon()
        raise AddressError("it took too long")
    if visit.error is not None:
        raise visit.error
    return visit.body


class _Visit(threading.Thread):
    """From an address, over redirections, to a body or an error."""

    def __init__(self, url: str, max_bytes: int, deadline: float) -> None:
        super().__init__(daemon=True)
        self.url, self.max_bytes, self.deadline = url, max_bytes, deadline
        self.body = b""
        self.error: Exception | None = None
        self._socket: socket.socket | None = None

    def run(self) -> None:
        try:
            url = self.url
            for _ in range(REDIRECTS + 1):
                onward = self._get(url)
                if onward is None:
                    return
                url = urljoin(url, onward)
            raise AddressError(f"it redirects more than {REDIRECTS} times")
        except Exception as error:  # the caller's thread raises it
            self.error = error

    def abandon(self) -> None:
        """Wake the thread if a server keeps it waiting; its next step sees that the time is over."""
        if self._socket is not None:
            with suppress(OSError):  # it was closed in the meantime
                self._socket.shutdown(socket.SHUT_RDWR)

    def _get(self, url: str) -> str | None:
        """Read the body; or return where it is to be found instead."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise AddressError("it is no valid address") from error
        if parts.scheme not in ("http", "https") or not host:
            raise AddressError("it is no http(s) address")
        if parts.username is not None or parts.password is not None:
            raise AddressError("it holds a user name or a password")
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port or 443, context=context)
        else:
            context = None
            connection = http.client.HTTPConnection(host, port or 80)
        try:
            connection.sock = self._connect(host, connection.port)
            if context is not None:  # in two steps: a socket that only shakes hands can be shut as well
                encrypted = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
                self._socket = connection.sock = encrypted
                encrypted.do_handshake()
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "dsvl"}
            connection.request("GET", path, headers=headers)
            return self._read(connection.getresponse())
        except AddressError:
            raise
        except ssl.SSLCertVerificationError as error:
            raise AddressError("its server's certificate is not valid for it") from error
        except TimeoutError as error:
            raise AddressError("it took too long") from error
        except (ValueError, http.client.InvalidURL) as error:  # letters that no address has
            raise AddressError("it is no valid address") from error
        except (OSError, http.client.HTTPException) as error:
            raise AddressError(_UNREACHABLE) from error
        finally:
            connection.close()

    def _connect(self, host: str, port: int) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not found or not all(is_public(str(entry[4][0])) for entry in found):
            raise AddressError(_UNREACHABLE)
        failure: OSError | None = None
        for place, (family, kind, protocol, _, address) in enumerate(found):
            self._socket = connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self._left() / (len(found) - place))  # one that is silent leaves time for the others
                connection.connect(address)
                connection.settimeout(self._left())
                return connection
            except OSError as error:
                connection.close()
                failure = error
        assert failure is not None
        raise failure

    def _read(self, response: http.client.HTTPResponse) -> str | None:
        if response.status in (301, 302, 303, 307, 308):
            onward = response.getheader("Location")
            if onward is None:
                raise AddressError("it redirects nowhere")
            return onward
        if response.status != 200:
            raise AddressError(f"its server answers with status {response.status}")
        body = bytearray()
        while chunk := response.read1(2**16):
            body += chunk
            if len(body) > self.max_bytes:
                raise AddressError(f"it is larger than {self.max_bytes:,} bytes")
            self._left()
        if response.length:
            raise AddressError("its server broke off")
        self.body = bytes(body)
        return None

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise AddressError("it took too long")
        return left
