"""Which controller to ask next. Pure but for the clock and the generator that are given.

A *breaker* per endpoint: after three failures in a row it is left alone for a while that doubles, with jitter, then one call
tries it. "I am not active" is no failure: the controller is well, it is only asked last for a moment, and the address that it
names is asked first. "Ask me again in a second" is none either: it is left alone for as long as it asked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from controller.agent.rights import Clock
from controller.errors import Misconfigured

TRIP = 3
COOL_SECONDS = 0.5
COOL_MAX_SECONDS = 5.0
STANDBY_SECONDS = 1.0
LEARNED_MAX = 8


@dataclass(slots=True)
class Endpoint:
    """One controller's base URL and how it has been doing."""

    url: str
    failures: int = 0
    open_until: float = -math.inf
    standby_until: float = -math.inf
    busy_until: float = -math.inf
    why: str = ""
    """Of its last failure."""
    used: int = 0
    learned: bool = False

    def ready(self, now: float) -> bool:
        """Whether it may be asked."""
        return now >= self.open_until and now >= self.busy_until


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """How a controller has been doing, as this client sees it.

    ``state``: ``active``; ``standby`` (it said so a moment ago); ``unknown`` (not asked yet); ``failing`` (fewer failures in a
    row than open its breaker); ``open`` (left alone for ``retry_seconds``); ``half-open`` (the next call tries it); ``busy``
    (it asked to be left alone for ``retry_seconds``). ``learned``: named by another controller, not configured.
    """

    url: str
    state: str
    failures: int
    retry_seconds: float
    learned: bool
    why: str = ""
    """What the last failure was, while ``failures`` are counted."""


def _base(url: str) -> str | None:
    """``http(s)://host[:port]`` without a path, or None when it is not such an address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


class Endpoints:
    """The list, with health. ``follow_hints`` False: addresses that answers name are used only when they are in the list.
    ``trusted``: whether an address that was named may be asked at all."""

    def __init__(
        self,
        urls: Sequence[str],
        clock: Clock,
        rng: random.Random,
        *,
        follow_hints: bool = True,
        trusted: Callable[[str], bool] = lambda _: True,
    ) -> None:
        bases = [_base(url) for url in urls]
        if not urls or None in bases:
            raise Misconfigured(
                f"endpoints {list(urls)!r} are not a list of controller addresses", hint="write them as http://127.0.1.1:8080"
            )
        self._all = [Endpoint(base) for base in dict.fromkeys(bases) if base is not None]
        self._clock = clock
        self._random = rng
        self._follow = follow_hints
        self._trusted = trusted
        self._turn = 0
        self._active: str | None = None
        self._schemes = {urlsplit(item.url).scheme for item in self._all}

    def urls(self) -> tuple[str, ...]:
        """Configured addresses, without learned ones."""
        return tuple(item.url for item in self._all if not item.learned)

    def pick(self) -> Endpoint | None:
        """The endpoint to ask now; None while every breaker is open."""
        now = self._clock.monotonic()
        ready = [item for item in self._all if item.ready(now)]
        if not ready:
            return None
        chosen = min(ready, key=lambda e: (now < e.standby_until, e.url != self._active, e.failures, e.used))
        self._turn += 1
        chosen.used = self._turn
        if chosen.failures >= TRIP:
            self._cool(chosen, now)  # half open: this one call may pass, others wait for what it finds
        return chosen

    def succeeded(self, endpoint: Endpoint) -> None:
        """It answered as the active controller."""
        endpoint.failures = 0
        endpoint.open_until = endpoint.standby_until = endpoint.busy_until = -math.inf
        self._active = endpoint.url

    def failed(self, endpoint: Endpoint, why: str = "") -> None:
        """It did not answer, or not sensibly."""
        endpoint.failures += 1
        endpoint.why = why
        if self._active == endpoint.url:
            self._active = None
        if endpoint.failures >= TRIP:
            self._cool(endpoint, self._clock.monotonic())

    def busy(self, endpoint: Endpoint, seconds: float) -> None:
        """It answered, and asked to be left alone for so long."""
        endpoint.failures = 0
        endpoint.open_until = -math.inf
        endpoint.busy_until = self._clock.monotonic() + seconds * self._random.uniform(1.0, 1.25)

    def health(self) -> tuple[EndpointHealth, ...]:
        """Every endpoint, in the order of the configuration."""
        now = self._clock.monotonic()
        return tuple(
            EndpointHealth(
                item.url,
                self._state(item, now),
                item.failures,
                max(0.0, max(item.open_until, item.busy_until) - now),
                item.learned,
                item.why if item.failures else "",
            )
            for item in self._all
        )

    def _state(self, item: Endpoint, now: float) -> str:
        if now < item.busy_until:
            return "busy"
        if item.failures >= TRIP:
            return "open" if now < item.open_until else "half-open"
        if item.failures:
            return "failing"
        if item.url == self._active:
            return "active"
        return "standby" if now < item.standby_until else "unknown"

    def why(self) -> str:
        """For people: each endpoint that is left alone, and for how long."""
        words = {"busy": "asked for a pause", "open": "failed several times in a row"}
        return "; ".join(
            f"{item.url} {words.get(item.state, item.state)}, next try in {item.retry_seconds:.1f} s"
            + (f" ({item.why})" if item.why else "")
            for item in self.health()
        )

    def not_active(self, endpoint: Endpoint, hint: str | None) -> bool:
        """It answered that it is not active. Returns whether it named another address that can be asked at once."""
        endpoint.failures = 0
        endpoint.open_until = -math.inf
        endpoint.standby_until = self._clock.monotonic() + STANDBY_SECONDS
        if self._active == endpoint.url:
            self._active = None
        base = _base(hint) if hint else None
        if base is None or base == endpoint.url:
            return False
        known = next((item for item in self._all if item.url == base), None) or self._learn(base)
        now = self._clock.monotonic()
        if known is None or not known.ready(now) or now < known.standby_until:
            return False
        self._active = base
        return True

    def _learn(self, base: str) -> Endpoint | None:
        """Never from https to http, and only so many: a hint is an answer from the network."""
        if not self._follow or urlsplit(base).scheme not in self._schemes or not self._trusted(base):
            return None
        learned = [item for item in self._all if item.learned]
        if len(learned) >= LEARNED_MAX:
            self._all.remove(min(learned, key=lambda item: item.used))
        self._all.append(Endpoint(base, learned=True))
        return self._all[-1]

    def _cool(self, endpoint: Endpoint, now: float) -> None:
        span = min(COOL_MAX_SECONDS, COOL_SECONDS * 2.0 ** min(endpoint.failures - TRIP, 10))
        endpoint.open_until = now + span * self._random.uniform(0.5, 1.0)
