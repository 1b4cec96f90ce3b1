"""One server's address: how it is written, how it is reached, one call.

A proxy is used where the usual variables name one (http_proxy, https_proxy, all_proxy, no_proxy), but never to this
machine's own loopback addresses, where no proxy could reach them.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from eagle.errors import RequestError

#: Where clients of such servers look for their key.
KEY_VARIABLE = "OPENAI_API_KEY"
#: Seconds for a connection to come about, which has nothing to do with how long a reply takes.
CONNECTS_WITHIN = 10.0
_USER = re.compile(r"(//)[^/@]*@")
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")
_PORTS = {"http": ":80", "https": ":443"}


def check_url(url: str) -> None:
    """Raises: RequestError, which does not repeat a password."""
    shown, expected = _USER.sub(r"\1...@", url), "expected an address such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        why = "" if shown != url else f"{error}; "
        raise RequestError(f"--server {shown}: {why}{expected}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise RequestError(f"--server {shown}: {expected}.")
    if "@" in parts.netloc:
        raise RequestError(
            f"--server {shown}: a user name and password in an address are shown and kept with it; {expected}. A key "
            f"is sent from {KEY_VARIABLE}."
        )
    if parts.path.rstrip("/").endswith(("/completions", "/models")):
        raise RequestError(f"--server {shown}: {expected}, without what comes behind the /v1.")


def normal_url(url: str) -> str:
    """The one way in which an address is written: two that lead to the same place are the same."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.lower().removesuffix(_PORTS[parts.scheme])}{parts.path.rstrip('/')}"


def key_headers() -> dict[str, str]:
    """What shows a server who asks. Raises: RequestError for a key that no header can hold, which is not shown."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise RequestError(
            f"{KEY_VARIABLE} has a character that no key has, a line break or one beyond ASCII. Set it to the key."
        )
    return {"Authorization": f"Bearer {key}"}


def proxy_to(url: str) -> SplitResult | None:
    """The proxy that the environment names for an address. Raises: RequestError for one that is no HTTP proxy."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    if not named or _LOOPBACK.fullmatch(host) or urllib.request.proxy_bypass(host):
        return None
    proxy = urlsplit(named if "//" in named else f"http://{named}")
    with contextlib.suppress(ValueError):
        if proxy.scheme == "http" and proxy.hostname and proxy.port != 0:
            return proxy
    shown = named.rpartition("@")[2]  # without a password
    raise RequestError(
        f"The environment names {shown} as the proxy to {url}; expected an HTTP proxy such as http://proxy:3128. Set "
        f"{parts.scheme}_proxy, or add {host} to no_proxy."
    )


@dataclass(slots=True)
class Address:
    """One server. busy: requests it has now. rests_until: nothing is asked of it before, where another is there.

    check: called when it does not answer; raises what is wrong where that is known.
    headers: that every request to it has. proxy: what it is reached by.
    """

    url: str
    check: Callable[[], None] = lambda: None
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    proxy: SplitResult | None = field(default=None, repr=False)
    busy: int = 0
    rests_until: float = 0.0

    @property
    def way(self) -> str:
        """How it is reached, where that is worth saying."""
        return f" (by the proxy {self.proxy.hostname}:{self.proxy.port or 80})" if self.proxy else ""

    def call(self, path: str, body: object | None, timeout: float) -> tuple[int, Any, bytes]:
        """Status, headers and content. timeout: seconds between two pieces of an answer.

        Raises: OSError, http.client.HTTPException.
        """
        connection, target, headers = self._reached(min(timeout, CONNECTS_WITHIN))
        headers |= {"Connection": "close", "Accept": "application/json", **self.headers}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        with contextlib.closing(connection):
            try:
                connection.connect()
            except TimeoutError as error:
                raise ConnectionError(
                    f"no connection within {connection.timeout:g} s (another host or port, or a firewall between)"
                ) from error
            connection.sock.settimeout(timeout)
            connection.request("GET" if body is None else "POST", target + path, data, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def _reached(self, timeout: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """A connection for each request: a reply takes seconds, and one that was kept may be closed by now.

        Also what stands before the path in a request, and the headers that a proxy wants.
        """
        parts = urlsplit(self.url)
        assert parts.hostname
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        path = parts.path.rstrip("/")
        if self.proxy is None:
            return kind(parts.hostname, parts.port, timeout=timeout), path, {}
        assert self.proxy.hostname
        headers = {}
        if self.proxy.username is not None:
            user = f"{unquote(self.proxy.username)}:{unquote(self.proxy.password or '')}"
            headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        connection = kind(self.proxy.hostname, self.proxy.port or 80, timeout=timeout)
        if parts.scheme == "http":
            return connection, f"http://{parts.netloc}{path}", headers
        connection.set_tunnel(parts.hostname, parts.port, headers)
        return connection, path, {}
