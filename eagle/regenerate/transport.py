"""Requests to OpenAI-compatible servers: dealt out to several, tried again where that helps, stopped where it does not.

Tried again, ever later and not all at the same moment: what does not connect, breaks off or takes too long, and the
statuses 408, 425, 429 and 5xx; a Retry-After is heeded. Any other status than 2xx is an answer that no second try would
change, and so is a 429 that says that the account is used up.

Whose fault it is, the others tell. A request fails by itself only by tries during which a server answers others; where
nobody else asks, a short question that was answered before is asked again. While nobody is answered, which is a server
that starts anew, everybody waits.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eagle.errors import WorkError
from eagle.regenerate.address import Address

_AGAIN = (408, 425, 429)
#: What a 429 says that no waiting changes.
USED_UP = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
#: How fields of an error are called that name it, and those that hold another error.
_CODES, _INSIDE = ("code", "type", "error_type"), ("innererror", "inner_error")
#: Seconds before the second try, and at most before any that no Retry-After asks for; the longest that one may ask for.
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 1.0, 60.0, 600.0
#: Seconds in which nobody is answered until that is said; in which a short question is answered by a server that lives.
_SILENT, _ALIVE_WITHIN = 20.0, 60.0
_SHOWN = 600


class Refused(Exception):
    """A server answered that the request is wrong. said: its own words. codes: its names for what is wrong."""

    def __init__(self, url: str, status: int, said: str, codes: frozenset[str] = frozenset()) -> None:
        super().__init__(f"{url} answered {status}: {said}")
        self.status, self.said, self.codes = status, said, codes


class Failed(Exception):
    """One request failed however often it was tried, while the servers answered others."""


class Stopped(Exception):
    """The job ends: nothing is waited for any more."""


@dataclass(slots=True)
class Tries:
    """What became of one request so far. first, last: when it failed. own: failures that were not everybody's."""

    began: float
    failures: int = 0
    own: int = 0
    first: float = 0.0
    last: float = 0.0


@dataclass(slots=True)
class Servers:
    """Servers of one model. Several threads may call them.

    retries: how often a request is tried again while others are answered. max_outage: seconds in which nobody is
    answered until the job ends. retried: how often requests were tried again, by what was wrong. short: path and body
    of a question that was answered, and quickly. tell: shows a line while everybody waits.
    """

    addresses: list[Address]
    timeout: float
    retries: int
    max_outage: float = 1800.0
    first_wait: float = _FIRST_WAIT
    retried: Counter[str] = field(default_factory=Counter)
    short: tuple[str, object] | None = None
    tell: Callable[[str], None] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)
    _asks_short: Any = field(default_factory=threading.Lock)
    _answered: float = -1.0
    _told: float = -2.0

    def call(
        self,
        path: str,
        body: object | None = None,
        address: Address | None = None,
        retries: int | None = None,
        flaw: Callable[[dict[str, Any]], str | None] = lambda answer: None,
    ) -> dict[str, Any]:
        """What a server answers, as JSON; one that is named, or whichever has least to do.

        retries: no more than so many, and no outage is waited for. flaw: what is wrong with an answer that another
        try may mend.
        Raises: Refused; Failed; WorkError where no server answers anybody; Stopped.
        """
        tries = Tries(time.monotonic())
        while True:
            if self.stop.is_set():
                raise Stopped
            chosen = self._choose(address)
            asked = None
            try:
                status, headers, content = chosen.call(path, body, self.timeout)
                if 200 <= status < 300:
                    answer = json.loads(content)
                    if not isinstance(answer, dict):
                        raise ValueError("no JSON object")
                    found = flaw(answer)
                    if found is None:
                        self._answered = time.monotonic()
                        return answer
                    kind, said = "broken off", found
                else:
                    said, codes = _said(content)
                    if status < 400:
                        said = f"it leads to {headers.get('Location') or 'somewhere else'}"
                    if (status < 500 and status not in _AGAIN) or (status == 429 and codes & USED_UP):
                        raise Refused(chosen.url, status, said, codes)
                    kind, asked = str(status), _retry_after(headers.get("Retry-After"))
                    said = f"{status}: {said}"
            except TimeoutError:
                kind = "timeout"
                said = f"no answer within {self.timeout:g} s (--timeout; fewer at once, --concurrency, are faster each)"
            except (OSError, http.client.HTTPException) as error:
                kind = "connection"
                said = (getattr(error, "strerror", None) or str(error) or type(error).__name__) + chosen.way
            except ValueError as error:
                kind, said = "not JSON", f"an answer that is not JSON ({error})"
            finally:
                with self._lock:
                    chosen.busy -= 1
            chosen.check()
            self._judge(tries, chosen, kind, said, retries)
            self._wait(chosen, kind, tries.failures, asked, is_named=address is not None)

    def _choose(self, address: Address | None) -> Address:
        with self._lock:
            now = time.monotonic()
            chosen = address or min(self.addresses, key=lambda one: (one.rests_until > now, one.busy))
            chosen.busy += 1
            return chosen

    def _judge(self, tries: Tries, address: Address, kind: str, said: str, retries: int | None) -> None:
        """Whether a request that failed once more is tried again. Raises: Failed, WorkError."""
        now = time.monotonic()
        before = tries.last if tries.failures else tries.began
        tries.failures, tries.last = tries.failures + 1, now
        if tries.failures == 1:
            tries.first = now
        if retries is not None or not self.retries:
            if tries.failures > min(retries or 0, self.retries):
                if retries is None and self._answered >= before:
                    raise Failed(f"{address.url}: {said}")
                raise self._gone(tries, address, said)
            return
        if tries.failures > 1:
            if self._answered >= before:
                # A server that asks for patience while it answers others lives, and has told how to live with it.
                tries.own += kind != "429"
            else:
                tries.own += self._answers_short(address)
                tries.last = time.monotonic()  # that one is nobody else's
        if tries.own >= self.retries:
            raise Failed(f"{address.url}: {said}")
        silent = now - max(tries.first, self._answered)
        if silent >= self.max_outage:
            raise self._gone(tries, address, said, " --max_outage raises for how long that is waited for.")
        if silent >= _SILENT:
            with self._lock:
                is_new, self._told = self._told < self._answered, now
            if is_new:
                self.tell(
                    f"nobody has been answered for {silent:,.0f} s ({address.url}: {said}); trying on for "
                    f"{self.max_outage - silent:,.0f} s (--max_outage)"
                )

    def _gone(self, tries: Tries, address: Address, said: str, advice: str = "") -> WorkError:
        return WorkError(
            f"{address.url} does not answer: {said} ({tries.failures} tries in {time.monotonic() - tries.began:,.0f} "
            "s). See that the server runs and that this machine reaches it, then run the same command again: the "
            f"replies that have come are kept.{advice}"
        )

    def _answers_short(self, address: Address) -> bool:
        """Whether a server answers what it has answered before; asked by one at a time."""
        if self.short is None or not self._asks_short.acquire(blocking=False):
            return False
        try:
            path, body = self.short
            with contextlib.suppress(OSError, http.client.HTTPException):
                if 200 <= address.call(path, body, min(self.timeout, _ALIVE_WITHIN))[0] < 300:
                    self._answered = time.monotonic()
                    return True
            return False
        finally:
            self._asks_short.release()

    def _wait(self, address: Address, kind: str, failures: int, asked: float | None, *, is_named: bool) -> None:
        longest = min(self.first_wait * 2.0 ** min(max(0, failures - 1), 16), _LONGEST_WAIT)
        seconds = asked + random.uniform(0, self.first_wait) if asked is not None else longest * random.uniform(0.5, 1)
        with self._lock:
            self.retried[kind] += 1
            address.rests_until = time.monotonic() + seconds
            is_another_free = not is_named and any(other.rests_until <= time.monotonic() for other in self.addresses)
        # Another server can be asked at once, but not without a pause by everybody in the same moment.
        self.stop.wait(random.uniform(0, self.first_wait) if is_another_free else seconds)


def _said(content: bytes) -> tuple[str, frozenset[str]]:
    """A server's own words for what is wrong, in one line, and its names for that."""
    text = content.decode("utf-8", "replace")
    codes: set[str] = set()
    with contextlib.suppress(ValueError):
        fields = json.loads(text)
        if isinstance(fields, str):
            text = fields
        if isinstance(fields, dict):
            inner = fields.get("error")
            fields = inner if isinstance(inner, dict) else fields
            message = fields.get("message") or fields.get("detail") or inner
            text = message if isinstance(message, str) else json.dumps(message or fields)
            # Azure's error has another one inside, which says more.
            inside = [fields, *(fields[name] for name in _INSIDE if isinstance(fields.get(name), dict))]
            codes = {str(one[name]).lower() for one in inside for name in _CODES if one.get(name)}
    text = " ".join(text.split())
    return (text[:_SHOWN] + " ..." if len(text) > _SHOWN else text) or "nothing", frozenset(codes)


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
