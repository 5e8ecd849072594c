"""A whole lab for tests that are not about it: real etcd, real stores, controllers in processes of their own, real ``drctl``.

The lab lives in a thread with a loop of its own, so that one lab serves all tests of a session, blocking ones too.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import httpx

from controller.cli.lab import read_settings
from controller.lab.parts import APPROVERS, REQUESTER
from controller.lab.supervisor import Lab
from controller.lab.topology import build

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 90.0
"""Longest wait for anything here: a machine that is busy with other tests is slow, not wrong."""


class RunningLab:
    """A context manager. Every method may be called from any thread but its own."""

    def __init__(self, state_dir: Path, *, offset: int, settings: dict[str, Any] | None = None, tls: bool = False) -> None:
        """``settings``: a document instead of ``config/lab.toml``. ``tls``: everything secured; people show their tokens."""
        self._loop = asyncio.new_event_loop()
        # Children die with the thread that started them: this one lives as long as the lab.
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab", daemon=True)
        self._said: list[str] = []
        self.lab = Lab(
            build(settings or read_settings(None), state_dir, offset=offset, tls=tls),
            say=self._said.append,
            hosts_per_region=0,
            agents=0,
        )
        self._http = httpx.Client(timeout=5.0, trust_env=False)

    def __enter__(self) -> RunningLab:
        self._thread.start()
        try:
            self._run(self.lab.up())
            if (secured := self.lab.secured) is not None:
                self._http.close()
                token = secured.token_file(REQUESTER).read_text().strip()
                self._http = httpx.Client(
                    timeout=5.0, trust_env=False, verify=secured.context(), headers={"Authorization": f"Bearer {token}"}
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self.lab.down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._http.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(300.0)

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """In the lab's own thread."""

        async def once() -> T:
            return work(*arguments)

        return self._run(once())

    # ----------------------------------------------------------------------------------------------------- looking

    def urls(self, region: str | None = None) -> list[str]:
        """Controllers' base URLs, of all regions or of one."""
        return [place.api.url for place in self.lab.topology.controllers if region in (None, place.region)]

    def active(self) -> str | None:
        """The region that serves now."""
        for place in self.lab.topology.controllers:
            try:
                if self._http.get(f"{place.api.url}/active", timeout=1.0).status_code == 200:
                    return place.region
            except httpx.HTTPError:
                continue
        return None

    def api(self, path: str, region: str | None = None) -> Any:
        """A document from the first controller that answers; None when none does."""
        for url in self.urls(region):
            try:
                answer = self._http.get(f"{url}{path}")
            except httpx.HTTPError:
                continue
            if answer.status_code == 200:
                return answer.json()
        return None

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
        """Polls until the condition is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}; logs are in {self.lab.layout.logs}"
            time.sleep(0.1)
        return value

    # ------------------------------------------------------------------------------------------------------ people

    def drctl(self, *words: str, expect: int = 0) -> Any:
        """A command as people type it (with a token where callers are known). Returns the JSON that it prints."""
        shown = self.lab.secured.environment(REQUESTER) if self.lab.secured is not None else {}
        ran = subprocess.run(
            [sys.executable, "-m", "controller", "--output", "json", *words],
            cwd=ROOT,
            env={**os.environ, "DR_CONFIG": str(self.lab.topology.operator_config), **shown},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == expect, f"drctl {' '.join(words)}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return json.loads(ran.stdout) if ran.stdout.strip() else None

    def move(self, kind: str, target: str, reason: str = "a test") -> str:
        """One plans, two approve with their keys, one gives the order; returns the plan's id when it is done."""
        made = self.drctl("plan", kind, "--to", target, "--reason", reason, "--requester", REQUESTER)
        plan = str(made["record"]["plan"]["id"])
        for name in APPROVERS:
            key = str(self.lab.layout.key(name))
            self.drctl("approve", plan, "--key", key, "--principal", name, "--confirm", target)
        self.drctl("promote", plan, "--execute", "--confirm", target, "--wait", "--requester", REQUESTER)
        self.until(lambda: self.active() == target, f"{target} to serve")
        return plan

    def fail_over(self, lost: str, target: str) -> str:
        """After a region was killed or frozen: waits until its lease has ended, then people move."""
        self.until(lambda: self._silent(target), f"the lease of {lost} to end")
        return self.move("failover", target, f"{lost} is silent")

    def _silent(self, target: str) -> bool:
        status = self.api("/v1/status", target)
        return status is not None and status["holders"] == []

    def reprotected(self) -> None:
        """Every region that is not active is a standby within the RPO."""

        def well() -> bool:
            status = self.api("/v1/status", self.active())
            if status is None or len(self.api("/v1/members", status["region"]) or ()) < len(self.lab.topology.controllers):
                return False
            lags = [region["lag"] for region in status["regions"] if not region["active"]]
            return all(
                isinstance(lag, dict) and isinstance(lag["seconds"], (int, float)) and lag["seconds"] <= status["rpo_seconds"]
                for lag in lags
            )

        self.until(well, "every standby to be within the RPO")
