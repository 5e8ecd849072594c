"""What every act of the demo stands on: commands run and shown, documents asked for, conditions waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from controller.errors import Unavailable
from controller.lab.demo_evidence import measured
from controller.lab.layout import DEFAULT_STATE_DIR
from controller.lab.supervisor import Lab
from controller.lab.telling import Ran, Teller, run_drctl, typed
from controller.lab.topology import Topology

PATIENCE_SECONDS = 90.0
"""For what the controllers do by themselves."""
PEOPLE_SECONDS = 3600.0
"""For what a person types (``--interactive``)."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the person chose. ``shown_dir``: the state directory as it was typed, for the commands that are shown."""

    agents: int = 50
    corpus: Path | None = None
    interactive: bool = False
    output: Path | None = None
    keep: bool = False
    shown_dir: Path = DEFAULT_STATE_DIR


class Stage:
    """A lab, a voice, and the way to the controllers. ``target`` is "" until a plan names it."""

    def __init__(self, topology: Topology, options: Options) -> None:
        self.options = options
        self.teller = Teller()
        self.lab = Lab(topology, say=self.teller.say, agents=options.agents, corpus=options.corpus)
        self.source = topology.home
        self.target = ""
        self.http = httpx.AsyncClient(timeout=5.0, trust_env=False)

    def own_dir(self) -> tuple[str, ...]:
        return () if self.options.shown_dir == DEFAULT_STATE_DIR else ("--state-dir", str(self.options.shown_dir))

    async def run(self, *arguments: str, expect: int | None = 0, last: int = 0) -> Ran:
        """One command, shown as typed, with its output (``last`` > 0: that many lines of it).
        Raises Unavailable for another exit code than ``expect`` (None = any)."""
        self.teller.command(typed(arguments))
        ran = await run_drctl(arguments, {"DR_CONFIG": str(self.lab.topology.operator_config)})
        self.teller.output(ran.output, last)
        if expect is not None and ran.code != expect:
            raise Unavailable(f"`{typed(arguments)}` ended with exit code {ran.code}", hint="its output is above")
        return ran

    async def by_person(self, words: Sequence[str], done: Callable[[], Awaitable[bool]], what: str, *, last: int = 0) -> None:
        """Runs the command; or, interactive, shows it and waits until somebody has typed it (or done the same)."""
        if not self.options.interactive:
            await self.run(*words, last=last)
            if not await done():
                await self.wait(done, what, regions=True)
            return
        self.teller.say("your turn, in another terminal:", "bold green")
        self.teller.command(typed(words))
        await self.wait(done, what, seconds=PEOPLE_SECONDS)

    async def wait(
        self,
        condition: Callable[[], Awaitable[bool]],
        what: str,
        *,
        seconds: float = PATIENCE_SECONDS,
        regions: bool = False,
        logs: tuple[str, ...] = (),
    ) -> None:
        """Polls; an answer that does not come counts as "not yet". ``regions``: a failure shows the ends
        of the controllers' logs."""

        async def holds() -> bool:
            with contextlib.suppress(Unavailable, httpx.HTTPError):
                return await condition()
            return False

        names = logs or (tuple(p.name for p in self.lab.topology.controllers if p.region != self.source) if regions else ())
        await self.lab.wait(holds, what, seconds=seconds, logs=names)

    async def api(self, path: str) -> Any:
        """A document from the first controller that answers, the target's first. Raises Unavailable."""
        places = sorted(
            self.lab.topology.controllers,
            key=lambda p: (p.region != self.target, p.region == self.source and bool(self.target)),
        )
        problem = ""
        for place in places:
            try:
                answer = await self.http.get(f"{place.api.url}{path}")
            except httpx.HTTPError as error:
                problem = f"{place.name}: {type(error).__name__}"
                continue
            if answer.status_code == 200:
                return answer.json()
            problem = f"{place.name}: {answer.status_code} {answer.text[:300]}"
        raise Unavailable(f"no controller answers {path} ({problem})", hint=f"logs are in {self.lab.layout.logs}")

    async def status(self) -> dict[str, Any]:
        """The status document."""
        document: dict[str, Any] = await self.api("/v1/status")
        return document

    async def lag(self) -> dict[str, float | None]:
        """Seconds that every region beside the active one is behind; None = unknown."""
        found = {}
        for region in (await self.status())["regions"]:
            if not region["active"]:
                lag = region["lag"]
                found[str(region["region"])] = measured(lag["seconds"]) if isinstance(lag, dict) else None
        return found

    async def within_rpo(self) -> bool:
        status, lag = await self.status(), await self.lag()
        others = len(self.lab.topology.regions) - 1
        return len(lag) == others and all(s is not None and s <= float(status["rpo_seconds"]) for s in lag.values())
