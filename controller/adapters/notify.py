"""Pages to people: a webhook, the log, or several at once. Best effort and bounded; never the basis of a decision.

Pages contain names that agents and strangers chose (agent names, error texts). Control, bidirectional and invisible
characters are therefore shown as escapes, and lengths are capped (``domain/text.py``), before anything leaves this process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx
import structlog

from controller.domain.text import MAX_LINE_CHARS, visible
from controller.errors import DrError, Misconfigured, Unavailable
from controller.ports import Page, Pager

MAX_BODY = 4000
"""Characters of a page's body. With escapes a page stays under 64 KiB."""

_METADATA = frozenset({ipaddress.ip_address("169.254.169.254"), ipaddress.ip_address("fd00:ec2::254")})

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


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

    Against request forgery through the settings: http and https only, no redirects, no proxies from the environment, the
    name resolved once and connected to by address, never a link-local or metadata address. The answer's body is not read.
    """

    reaches_people = True

    def __init__(self, url: str, timeout_seconds: float, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """``transport``: how requests travel, for tests. Raises Misconfigured for a URL that cannot be used."""
        self._url = _checked_url(url)
        if timeout_seconds <= 0:
            raise Misconfigured(f"notify.timeout_seconds is {timeout_seconds}", hint="give a number of seconds above 0")
        self._where = f"{self._url.scheme}://{self._url.netloc.decode('ascii')}"
        self._timeout = timeout_seconds
        self._client = httpx.AsyncClient(
            timeout=timeout_seconds,
            follow_redirects=False,
            trust_env=False,
            transport=transport,
            limits=httpx.Limits(max_connections=4),
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
        host = self._url.host
        address = await _resolved(host, self._url.port or (443 if self._url.scheme == "https" else 80))
        request = self._client.build_request(
            "POST",
            self._url.copy_with(host=str(address)),
            json=as_fields(page),
            headers={"Host": self._url.netloc.decode("ascii")},
            # The certificate is checked for the name in the settings, not for the address.
            extensions={"sni_hostname": host, "timeout": httpx.Timeout(self._timeout).as_dict()},
        )
        response = await self._client.send(request, stream=True)
        await response.aclose()
        return response.status_code

    async def close(self) -> None:
        """Closes idle connections."""
        await self._client.aclose()


def _checked_url(url: str) -> httpx.URL:
    hint = "set notify.webhook_url to an http or https URL without user name and password"
    try:
        parts, parsed = urlsplit(url), httpx.URL(url)
        port = parts.port
    except (ValueError, httpx.InvalidURL) as error:
        raise Misconfigured("notify.webhook_url is not a URL", hint=hint) from error
    if parts.scheme not in ("http", "https") or not parsed.host or port == 0:
        raise Misconfigured(f"notify.webhook_url has scheme {parts.scheme[:20]!r} or no usable host", hint=hint)
    if parts.username is not None or parts.password is not None:
        raise Misconfigured("notify.webhook_url holds a user name or password", hint=hint)
    try:
        _checked_address(ipaddress.ip_address(parsed.host))
    except ValueError:
        return parsed  # A name: resolved, and its address checked, at every page.
    return parsed


async def _resolved(host: str, port: int) -> IpAddress:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"the webhook's host {host} has no address", hint="check notify.webhook_url and DNS") from error
    return _checked_address(ipaddress.ip_address(found[0][4][0]))


def _checked_address(address: IpAddress) -> IpAddress:
    plain = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped else address
    if plain.is_link_local or plain.is_multicast or plain.is_unspecified or plain in _METADATA:
        raise Misconfigured(f"the webhook's address {plain} is link-local, multicast or metadata", hint="name another host")
    return address


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
