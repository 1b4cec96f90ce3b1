"""Requests to OpenAI-compatible servers: dealt out to several, tried again where that helps, stopped where it does not.

Tried again, ever later and not all at the same moment: what does not connect, breaks off or takes too long, and the
statuses 408, 425, 429 and 5xx; a Retry-After is heeded. Any other 4xx is an answer that no second try would change.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from eagle.errors import WorkError

#: Where clients of such servers look for their key.
KEY_VARIABLE = "OPENAI_API_KEY"
_AGAIN = (408, 425, 429)
#: Seconds before the second try, and at most before any that no Retry-After asks for; the longest that one may ask for.
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 1.0, 60.0, 600.0
_SHOWN = 600


class Refused(Exception):
    """A server answered that the request is wrong. said: its own words."""

    def __init__(self, url: str, status: int, said: str, code: str = "") -> None:
        super().__init__(f"{url} answered {status}: {said}")
        self.status, self.said, self.code = status, said, code


class Failed(Exception):
    """One request failed however often it was tried, while the servers answered others."""


class Stopped(Exception):
    """The job ends: nothing is waited for any more."""


@dataclass(slots=True)
class Address:
    """One server. busy: requests it has now. rests_until: nothing is asked of it before, where another is there.

    check: called when it does not answer; raises what is wrong where that is known.
    """

    url: str
    check: Callable[[], None] = lambda: None
    busy: int = 0
    rests_until: float = 0.0

    def call(self, path: str, body: object | None, timeout: float) -> tuple[int, Any, bytes]:
        """Status, headers and content. Raises: OSError, http.client.HTTPException."""
        parts = urlsplit(self.url)
        assert parts.hostname
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        # A connection for each request: a reply takes seconds, and one that was kept may be closed by now.
        connection = kind(parts.hostname, parts.port, timeout=timeout)
        headers = {"Connection": "close", "Accept": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
            else:
                headers["Content-Type"] = "application/json"
                connection.request("POST", parts.path.rstrip("/") + path, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()


@dataclass(slots=True)
class Servers:
    """Servers of one model. Several threads may call them.

    retries: how often a request is tried again. retried: how often that was, by what was wrong.
    """

    addresses: list[Address]
    timeout: float
    retries: int
    first_wait: float = _FIRST_WAIT
    retried: Counter[str] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)
    _answered: float = -1.0

    def call(
        self, path: str, body: object | None = None, address: Address | None = None, retries: int | None = None
    ) -> dict[str, Any]:
        """What a server answers, as JSON; one that is named, or whichever has least to do.

        Raises: Refused; Failed; WorkError where no server answers anybody; Stopped.
        """
        began, tries = time.monotonic(), 0
        retries = self.retries if retries is None else min(retries, self.retries)
        while True:
            if self.stop.is_set():
                raise Stopped
            chosen = self._choose(address)
            kind, said, asked = "", "", None
            try:
                status, headers, content = chosen.call(path, body, self.timeout)
                if status < 300:
                    answer = json.loads(content)
                    if not isinstance(answer, dict):
                        raise ValueError("no JSON object")
                    self._answered = time.monotonic()
                    return answer
                said, code = _said(content)
                if 400 <= status < 500 and status not in _AGAIN:
                    raise Refused(chosen.url, status, said, code)
                kind, asked = str(status), _retry_after(headers.get("Retry-After"))
                said = f"{status}: {said}"
            except TimeoutError:
                kind = "timeout"
                said = f"no answer within {self.timeout:g} s (--timeout; fewer at once, --concurrency, are faster each)"
            except (OSError, http.client.HTTPException) as error:
                kind = "connection"
                said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            except ValueError as error:
                kind, said = "not JSON", f"an answer that is not JSON ({error})"
            finally:
                with self._lock:
                    chosen.busy -= 1
            chosen.check()
            others_answer = self._answered >= began
            # A server that asks for patience lives; only where it has none for anybody, an end comes to that.
            if kind != "429" or not others_answer:
                tries += 1
            if tries > retries:
                if others_answer:
                    raise Failed(f"{chosen.url}: {said}")
                raise WorkError(
                    f"{chosen.url} does not answer: {said} ({tries} tries in {time.monotonic() - began:,.0f} s). See "
                    "that the server runs and that this machine reaches it, then run the same command again: the "
                    "replies that have come are kept. --retries raises how often a request is tried."
                )
            self._wait(chosen, kind, tries, asked, is_named=address is not None)

    def _choose(self, address: Address | None) -> Address:
        with self._lock:
            now = time.monotonic()
            chosen = address or min(self.addresses, key=lambda one: (one.rests_until > now, one.busy))
            chosen.busy += 1
            return chosen

    def _wait(self, address: Address, kind: str, tries: int, asked: float | None, *, is_named: bool) -> None:
        longest = min(self.first_wait * 2 ** max(0, tries - 1), _LONGEST_WAIT)
        seconds = asked + random.uniform(0, self.first_wait) if asked is not None else longest * random.uniform(0.5, 1)
        with self._lock:
            self.retried[kind] += 1
            address.rests_until = time.monotonic() + seconds
            is_another_free = not is_named and any(other.rests_until <= time.monotonic() for other in self.addresses)
        # Another server can be asked at once, but not without a pause by everybody in the same moment.
        self.stop.wait(random.uniform(0, self.first_wait) if is_another_free else seconds)


def _said(content: bytes) -> tuple[str, str]:
    """A server's own words for what is wrong, in one line, and its code for that."""
    text = content.decode("utf-8", "replace")
    code = ""
    with contextlib.suppress(ValueError):
        fields = json.loads(text)
        if isinstance(fields, str):
            text = fields
        if isinstance(fields, dict):
            inner = fields.get("error")
            fields = inner if isinstance(inner, dict) else fields
            message = fields.get("message") or fields.get("detail") or inner
            text = message if isinstance(message, str) else json.dumps(message or fields)
            code = str(fields.get("code") or "")
    text = " ".join(text.split())
    return (text[:_SHOWN] + " ..." if len(text) > _SHOWN else text) or "nothing", code


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(0.0, seconds), _LONGEST_ASKED)
