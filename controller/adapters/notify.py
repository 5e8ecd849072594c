"""Pages to people: a webhook, the log, or several at once. Best effort and bounded; never the basis of a decision.

Pages contain names that agents and strangers chose (agent names, error texts). Control, bidirectional and invisible
characters are therefore shown as escapes, and lengths are capped (``domain/text.py``), before anything leaves this process.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx
import structlog

from controller.adapters.outward import GuardedTransport
from controller.domain.outward import Network, address_problem, host_problem, port_problem
from controller.domain.text import MAX_LINE_CHARS, visible
from controller.errors import DrError, Misconfigured, Unavailable
from controller.ports import Page, Pager

MAX_BODY = 4000
"""Characters of a page's body. With escapes a page stays under 64 KiB."""


def as_fields(page: Page) -> dict[str, str]:
    """The page as it leaves this process."""
    return {
        "key": visible(page.key, MAX_LINE_CHARS),
        "severity": visible(page.severity, MAX_LINE_CHARS),
        "title": visible(page.title, MAX_LINE_CHARS),
        "body": visible(page.body, MAX_BODY, keep="\n"),
        "runbook": visible(page.runbook, MAX_LINE_CHARS),
    }


class WebhookPager:
    """POSTs a page as JSON. The URL often holds a secret, so messages name its host only.

    Against request forgery through the settings: http and https only, no redirects, no proxies from the environment, and only
    to addresses that ``domain/outward.py`` allows. The answer's body is not read.
    """

    reaches_people = True

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        *,
        allowed: Sequence[Network] = (),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``allowed``: networks inside that the receiver may stand in. ``transport``: how requests travel, for tests.

        Raises Misconfigured for a URL that cannot be used.
        """
        self._url = _checked_url(url, allowed)
        if timeout_seconds <= 0:
            raise Misconfigured(f"notify.timeout_seconds is {timeout_seconds}", hint="give a number of seconds above 0")
        self._where = f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"
        self._timeout = timeout_seconds
        self._client = httpx.AsyncClient(
            timeout=timeout_seconds,
            follow_redirects=False,
            trust_env=False,
            transport=transport or GuardedTransport(allowed, connections=4),
        )

    async def page(self, page: Page) -> None:
        """Raises Unavailable unless the receiver answered 2xx in time."""
        hint = "check notify.webhook_url and its receiver"
        try:
            async with asyncio.timeout(self._timeout):
                status = await self._post(page)
        except TimeoutError:
            raise Unavailable(f"{self._where} did not take a page within {self._timeout:g} s", hint=hint) from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._where} did not take a page: {type(error).__name__}", hint=hint) from error
        if not 200 <= status < 300:
            why = ", a redirect, which is not followed" if 300 <= status < 400 else ""
            raise Unavailable(f"{self._where} answered a page with status {status}{why}", hint=hint)

    async def _post(self, page: Page) -> int:
        # Status and headers only: what the receiver says is of no interest, and may be endless.
        async with self._client.stream("POST", self._url, json=as_fields(page)) as response:
            return response.status_code

    async def close(self) -> None:
        """Closes idle connections."""
        await self._client.aclose()


def _checked_url(url: str, allowed: Sequence[Network]) -> httpx.URL:
    hint = "set notify.webhook_url to an http or https URL without user name and password"
    try:
        parts, parsed = urlsplit(url), httpx.URL(url)
        port = parts.port
    except (ValueError, httpx.InvalidURL) as error:
        raise Misconfigured("notify.webhook_url is not a URL", hint=hint) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Misconfigured(f"notify.webhook_url has scheme {parts.scheme[:20]!r} or no usable host", hint=hint)
    if parts.username is not None or parts.password is not None:
        raise Misconfigured("notify.webhook_url holds a user name or password", hint=hint)
    problem = host_problem(parts.hostname) or port_problem(443 if port is None else port)
    if problem is None and parsed.host != parts.hostname:
        problem = "is read as two hosts by two libraries"
    if problem is None:
        try:
            literal = ipaddress.ip_address(parts.hostname)
        except ValueError:
            return parsed  # A name: resolved, and its addresses judged, at every connection.
        problem = address_problem(literal, allowed)
    if problem is not None:
        raise Misconfigured(f"notify.webhook_url: {problem}", hint="name another host, or put its network into notify.networks")
    return parsed


class LogPager:
    """Writes a page to the log. A log wakes nobody: it is the copy, not the page."""

    reaches_people = False

    def __init__(self) -> None:
        self._log = structlog.get_logger("pager")

    async def page(self, page: Page) -> None:
        """Never fails."""
        levels = {"critical": self._log.critical, "error": self._log.error, "info": self._log.info}
        levels.get(page.severity, self._log.warning)("page", **as_fields(page))


class MultiPager:
    """Pages through several at once. Reaching people one way is success; the log alone only if it is all there is."""

    def __init__(self, pagers: Sequence[Pager]) -> None:
        """Raises Misconfigured for an empty list."""
        if not pagers:
            raise Misconfigured("no way to page is configured", hint="use at least the log")
        self._pagers = tuple(pagers)
        human = [pager for pager in self._pagers if getattr(pager, "reaches_people", True)]
        self._counting = tuple(human) or self._pagers

    async def page(self, page: Page) -> None:
        """Raises Unavailable, with every reason, when nobody could be reached."""
        results = await asyncio.gather(*(pager.page(page) for pager in self._pagers), return_exceptions=True)
        reasons: list[str] = []
        reached = False
        for pager, result in zip(self._pagers, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, DrError):
                raise result
            if isinstance(result, DrError):
                reasons.append(str(result))
            elif pager in self._counting:
                reached = True
        if not reached:
            what = f"nobody was paged for {visible(page.key, MAX_LINE_CHARS)}"
            raise Unavailable(f"{what}: {'; '.join(reasons)}", hint="call people by hand")
