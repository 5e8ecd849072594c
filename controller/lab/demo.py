"""The whole story, played with real parts: three regions, a fleet, a disaster, approvals, a promotion, the return, a report.

Every act can be called on its own; each polls for what it waits for, with a deadline, and says what was missing. The
commands are those of ``runbooks/region-failover.md``, run through the real command line in processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx

from controller.errors import Refused, Unavailable
from controller.lab import demo_report as report
from controller.lab import work
from controller.lab.demo_commands import command
from controller.lab.demo_evidence import (
    ActiveWatch,
    OutsideView,
    look_from_outside,
    open_store,
    read_history,
    read_refs,
    salvage_refs,
)
from controller.lab.demo_ledger import Ledgers
from controller.lab.demo_report import Report, Stored
from controller.lab.demo_show import show_report
from controller.lab.demo_stage import Options, Stage
from controller.lab.late_writer import read_log
from controller.lab.parts import APPROVERS, REQUESTER
from controller.lab.processes import Started, tail
from controller.lab.topology import Topology

POLL_SECONDS = 0.2
WARM_CHECKPOINTS = 4
"""Acknowledged checkpoints that every agent has before the disaster begins."""
BROKEN_LINK_SECONDS = 1.5
"""Regions die in pieces: the links go first. What is acknowledged from then on until
the kill (the command needs a second of its own) is what the promotion will lose."""


class Demo(Stage):
    """One run. ``play`` goes through all acts and always takes the lab down. Raises Refused for a group of several streams: its
    checks count one history and one active instance."""

    def __init__(self, topology: Topology, options: Options) -> None:
        streams = topology.document.get("stream", {}).get("streams", 1)
        if streams != 1:
            raise Refused(
                f"stream.streams = {streams}: the demo's checks count one stream", hint="try several with `drctl lab up`"
            )
        super().__init__(topology, options)
        self.ledgers = Ledgers(self.lab.hosts)
        self.stream = ""
        self.old_epoch = 0
        self.plan_id = ""
        self.plan: dict[str, Any] = {}
        self.promised: report.Promise | None = None
        self.late: Started | None = None
        self.outside = OutsideView((), "", "")
        self.marks: dict[str, float] = {}
        """Wall clock of what happened."""
        self.survived: tuple[Stored, ...] = ()
        self.salvaged: tuple[Stored, ...] = ()
        self.watch = ActiveWatch(topology.controllers)

    # ------------------------------------------------------------------------------------------------------------ play

    async def play(self) -> bool:
        """The story. Returns whether every check of the report holds. Raises DrError when an act cannot be finished."""
        try:
            await self._acts()
            done = await self.conclude()
            if self.options.keep:
                self.teller.say("--keep: the lab goes on until Ctrl-C (or `drctl lab down`)")
                await self.lab.stopping.wait()
            return done.held
        except Exception:
            self.teller.say(f"the demo failed; the logs are in {self.lab.layout.logs}", "bold red")
            for place in self.lab.topology.controllers:
                if end := tail(self.lab.layout.logs / f"{place.name}.log", 6):
                    self.teller.say(f"--- {place.name}")
                    self.teller.output(end)
            raise
        finally:
            await self.watch.stop()
            await self.http.aclose()
            await self.lab.down()

    async def _acts(self) -> None:
        await self.bring_up()
        await self.work()
        await self.look()
        await self.disaster()
        await self.notice()
        await self.propose()
        await self.approve()
        await self.promote()
        await self.resume()
        await self.thaw()
        await self.reprotect()

    async def bring_up(self) -> None:
        """Act 1."""
        self.teller.act("Three regions come up on this machine")
        await self.lab.up()
        self.watch.start()
        self.teller.say(f"regions {', '.join(region.name for region in self.lab.topology.regions)}; home is {self.source}")
        self.teller.command(f"export DR_CONFIG={self.options.shown_dir}/drctl.toml")

    async def work(self) -> None:
        """Act 2: tasks through the client; then the agents read and think until each has a few acknowledged checkpoints."""
        self.teller.act(f"A fleet of {self.options.agents} agents goes to work")
        specs = await self.lab.give_tasks()
        two = sum(1 for spec in specs.values() if spec.get("copies") == 2)
        self.teller.say(
            f"{len(specs)} tasks are in the stream; {two} agents ask for two copies of every step, the others for one"
        )

        async def warm() -> bool:
            counts = dict.fromkeys(specs, 0)
            for written in self.ledgers.acknowledged(self.source):
                counts[written.agent] = counts.get(written.agent, 0) + 1
            return min(counts.values()) >= WARM_CHECKPOINTS and await self.within_rpo()

        await self.wait(warm, f"{WARM_CHECKPOINTS} acknowledged checkpoints of every agent and a lag within the RPO")
        written = self.ledgers.acknowledged(self.source)
        self.teller.say(f"{len(written)} checkpoints are acknowledged, the other regions follow within the RPO")

    async def look(self) -> None:
        """Act 3: what people see. And the late writer takes its last look at the world."""
        self.teller.act("What the on-call engineer sees")
        await self.run(*command("status"))
        await self.run(*command("lag"))
        status = await self.status()
        holder = status["holders"][0]
        self.stream, self.old_epoch = str(holder["stream"]), int(holder["epoch"])

    async def _arm_late_writer(self) -> None:
        """Started while the region is well, so that it holds the true epoch; it will sleep through what comes."""
        self.late = self.lab.start_late_writer(self.source)

        async def armed() -> bool:
            return any(line["event"] == "armed" for line in self._late_lines())

        await self.wait(armed, "the late writer to look at the world", logs=("late-writer",))
        seen = self._late_lines()[-1]
        self.teller.say(f"(a late writer gets ready in {self.source}: epoch {seen['epoch']}, heads {seen['heads']})")

    async def disaster(self) -> None:
        """Act 4: the links of the active region break; a moment later the region dies."""
        self.teller.act(f"Disaster: {self.source} dies in pieces")
        await self._arm_late_writer()
        before = len(self.ledgers.acknowledged(self.source))
        await self.lab.wan("set", source=self.source, cut=True)
        self.marks["cut"] = time.time()
        self.teller.say(f"every link from {self.source} to the stores of the other regions is a black hole now", "bold red")
        await asyncio.sleep(BROKEN_LINK_SECONDS)
        await self.by_person((*command("kill", region=self.source), *self.own_dir()), self._killed, "the region to be killed")
        self.marks["kill"] = self.lab.killed_at[self.source]
        since = [w for w in self.ledgers.acknowledged(self.source)[before:] if w.at > self.marks["cut"]]
        alone = sum(1 for w in since if w.copies == 1)
        self.teller.say(
            f"{self.marks['kill'] - self.marks['cut']:.1f} s without links: {alone} checkpoints with copies = 1 acknowledged "
            f"at home alone, {len(since) - alone} with copies = 2"
        )

    async def _killed(self) -> bool:
        return self.source in self.lab.killed_at

    async def notice(self) -> None:
        """Act 5: nobody touches anything. The lease ends, a standby notices, opens an incident, pages, proposes."""
        self.teller.act("The lease runs out; standbys notice, page, and propose")
        incident: dict[str, Any] = {}

        async def opened() -> bool:
            for found in await self.api("/v1/incidents"):
                if found["plan"] and found["opened_at"] >= self.marks["kill"] - 1.0:
                    incident.update(found)
            return bool(incident)

        await self.wait(opened, "an incident with a proposed plan", regions=True)
        self.marks["incident"] = float(incident["opened_at"])
        self.teller.say(f"incident after {self.marks['incident'] - self.marks['kill']:.1f} s: {incident['title']}")
        page: dict[str, Any] = {}

        async def paged() -> bool:
            with contextlib.suppress(FileNotFoundError):
                for line in self.lab.layout.pages.read_text().splitlines():
                    found = json.loads(line)
                    if float(found.get("received_at", 0)) >= self.marks["kill"]:
                        page.update(found)
                        return True
            return False

        await self.wait(paged, "the page at the webhook receiver", regions=True)
        self.marks["page"] = float(page["received_at"])
        self.teller.say(
            f"paged after {self.marks['page'] - self.marks['kill']:.1f} s: {page.get('title')}: {page.get('body', '')}"
        )
        self.target = str((await self.api(f"/v1/plans/{incident['plan']}"))["record"]["plan"]["target"])
        await self.run(*command("status"))
        await self.run(*command("incidents"))

    async def propose(self) -> None:
        """Act 6: a person asks for the move, on fresh evidence."""
        self.teller.act(f"{REQUESTER} plans the failover to {self.target}")
        known = {record["plan"]["id"] for record in await self.api("/v1/plans")}
        words = command("plan", region=self.target, reason=f"{self.source} is silent", name=REQUESTER)

        async def made() -> bool:
            for record in await self.api("/v1/plans"):
                if record["plan"]["id"] not in known and record["plan"]["kind"] == "failover":
                    self.plan_id, self.target = record["plan"]["id"], record["plan"]["target"]
            return bool(self.plan_id)

        await self.by_person(words, made, "a new plan")
        self.plan = (await self.api(f"/v1/plans/{self.plan_id}"))["record"]
        self.marks["plan"] = float(self.plan["plan"]["created_at"])
        loss = self.plan["plan"]["evidence"]["loss"]
        self.promised = report.Promise(
            int(loss["records"]), bool(loss["records_unknown"]), float(loss["seconds"]), bool(loss["exact"])
        )

    async def approve(self) -> None:
        """Act 7: the requester does not count; two others do."""
        how = "you type the commands" if self.options.interactive else "the demo plays all three people"
        self.teller.act(f"Two people approve with their SSH keys ({how})")
        if not self.options.interactive:
            ran = await self.run(*self._approval(REQUESTER), expect=None, last=2)
            if ran.code == 0:
                raise Unavailable("the requester's own approval was taken", hint="this breaks promise 3; keep the logs")
            self.teller.say(f"refused, exit code {ran.code}: whoever asks does not count", "yellow")
        for n, name in enumerate(APPROVERS, 1):

            async def counted(n: int = n) -> bool:
                return sum(1 for a in (await self.api(f"/v1/plans/{self.plan_id}"))["approvals"] if a["valid"]) >= n

            await self.by_person(self._approval(name), counted, f"approval {n}", last=3)
        self.marks["approved"] = time.time()

    def _approval(self, name: str) -> tuple[str, ...]:
        key = f"{self.options.shown_dir}/keys/{name}"
        return command("approve", plan=self.plan_id, key=key, name=name, region=self.target)

    async def promote(self) -> None:
        """Act 8: the ten steps; meanwhile somebody outside keeps asking for the group's name."""
        self.teller.act(f"Promotion of {self.target}")
        self.marks["execute"] = time.time()
        probe = asyncio.create_task(self._probe())
        words = command("promote", plan=self.plan_id, region=self.target, name=REQUESTER)
        try:
            await self.by_person(words, self._plan_done, "the plan to be done")
            await self.wait(self._plan_done, f"plan {self.plan_id} to be done", regions=True)
            await asyncio.wait_for(probe, 30.0)
        finally:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        self.teller.say(
            f"from outside: {self.lab.topology.dns_name} leads to {', '.join(self.outside.addresses)}; "
            f"{self.outside.active} is active there, "
            f"{self.marks['served'] - self.marks['kill']:.1f} s after the disaster, "
            f"{self.marks['served'] - self.marks['execute']:.1f} s after the order to go"
        )

    async def _plan_done(self) -> bool:
        document = await self.api(f"/v1/plans/{self.plan_id}")
        self.plan = document["record"]
        if self.plan["state"] in ("refused", "void", "expired", "aborted"):
            raise Unavailable(f"plan {self.plan_id} ended as {self.plan['state']}: {self.plan['reason']}", hint="see the logs")
        return bool(self.plan["state"] == "done")

    async def _probe(self) -> None:
        """Asks DNS and the answered addresses until the name leads to an active controller of the target."""
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
            while True:
                self.outside = await look_from_outside(self.lab.topology, client)
                if self.outside.active.startswith(f"{self.target}/"):
                    self.marks["served"] = time.time()
                    return
                await asyncio.sleep(POLL_SECONDS)

    async def resume(self) -> None:
        """Act 9: every agent starts in the target from its last checkpoint there."""
        self.teller.act(f"The fleet goes on in {self.target}")
        agents = set(work.fleet_specs(self.options.agents))

        async def resumed() -> bool:
            return agents <= {r.agent for r in self.ledgers.resumptions(self.target) if r.at >= self.marks["kill"]}

        await self.wait(resumed, "every agent to resume", regions=True)
        starts = {r.agent: r.at for r in reversed(self.ledgers.resumptions(self.target)) if r.at >= self.marks["kill"]}
        self.marks["resumed"] = max(starts.values())

        async def working() -> bool:
            return agents <= {w.agent for w in self.ledgers.acknowledged(self.target)}

        await self.wait(working, "an acknowledged checkpoint of every agent in the new region", regions=True)
        self.marks["working"] = time.time()
        store = open_store(self.lab.topology, self.target)
        await store.start()
        try:
            self.survived = await read_history(store, self.stream, last_epoch=self.old_epoch)
        finally:
            await store.close()
        self.teller.say(f"{len(agents)} agents resumed and checkpointed again; {len(self.survived)} old checkpoints survived")

    async def thaw(self) -> None:
        """Act 10: the old region wakes up and does not know."""
        self.teller.act(f"{self.source} comes back; a late writer tries to go on")
        await self.lab.wan("set", source=self.source, cut=False)
        self.marks["thaw"] = time.time()
        back = self._source_is_back
        await self.by_person((*command("thaw", region=self.source), *self.own_dir()), back, "the region to be thawed")

        async def tried() -> bool:
            return any(line["event"] in ("finished", "failed") for line in self._late_lines())

        await self.wait(tried, "the late writer to have tried everything", logs=("late-writer",))
        for line in self._late_lines():
            if line["event"] == "try":
                style = "bold red" if line["outcome"] == "ACCEPTED" else "yellow"
                told = f"{line['outcome']} ({line.get('error', '')}): {line.get('message', '')}"
                self.teller.say(f"epoch {line['epoch']} at {line['target']} ({line['attempt']}): {told}", style)

    async def _source_is_back(self) -> bool:
        return all(
            p["state"] == "running"
            for p in self.lab.status()["processes"]
            if p["region"] == self.source and p["kind"] != "late-writer"
        )

    def _late_lines(self) -> list[dict[str, Any]]:
        return read_log(self.lab.log("late-writer"), self.late.pid) if self.late is not None else []

    async def reprotect(self) -> None:
        """Act 11: the old region is a standby now, its tail is salvage, everybody is within the RPO again."""
        self.teller.act(f"{self.source} becomes a standby; nothing of it is thrown away")

        async def standby() -> bool:
            roles = {m["role"] for m in await self.api("/v1/members") if m["region"] == self.source}
            return roles == {"standby"} and await self.within_rpo()

        await self.wait(standby, f"{self.source} to be a standby within the RPO", regions=True)
        self.marks["reprotected"] = time.time()
        store = open_store(self.lab.topology, self.source)
        await store.start()
        try:
            refs = salvage_refs(await store.read_head(self.stream))
            self.salvaged = await read_refs(store, refs)
        finally:
            await store.close()
        self.teller.say(f"salvage: {len(refs)} segments, {len(self.salvaged)} checkpoints, kept in {self.source}")
        await self.run(*command("status"))
        await self.run(*command("lag"))

    # -------------------------------------------------------------------------------------------------------- conclude

    async def conclude(self) -> Report:
        """Act 12: what was promised beside what was real, from ledgers and stores."""
        self.teller.act("The report")
        assert self.promised is not None
        document = await self.api(f"/v1/plans/{self.plan_id}")
        acknowledged = self.ledgers.acknowledged(self.source)
        resumptions = [r for r in self.ledgers.resumptions(self.target) if r.at >= self.marks["kill"]]
        real = report.real_loss(acknowledged, self.survived)
        agents = sorted(work.fleet_specs(self.options.agents))
        outcomes = report.outcomes(agents, acknowledged, resumptions, self.survived, self.target)
        tries = [line for line in self._late_lines() if line["event"] == "try"]
        lag = await self.lag()
        missing = report.unsalvaged(real.lost, self.salvaged)
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
            outside = await look_from_outside(self.lab.topology, client)
        found = report.checks(
            promised=self.promised,
            real=real,
            agents=outcomes,
            missing_salvage=missing,
            salvaged_records=len(self.salvaged),
            refusals=tries,
            stores=[region.name for region in self.lab.topology.regions],
            active=self.watch.active,
            target=self.target,
            most_active=self.watch.most,
            lag_seconds=lag,
            rpo_seconds=float((await self.status())["rpo_seconds"]),
            resolved_region=outside.region,
        )
        made = report.assemble(
            agents=outcomes,
            source=self.source,
            target=self.target,
            marks=self.marks,
            journal=document["journal"],
            promised=self.promised,
            recorded=document["record"]["final_loss"],
            real=real,
            salvaged=len(self.salvaged),
            missing=missing,
            tries=tries,
            checks=found,
            run={
                "acknowledged_before": len(acknowledged),
                "unacknowledged_before": len(self.ledgers.unacknowledged(self.source)),
                "survived": len(self.survived),
                "activity_probes": self.watch.rounds,
                "lag_seconds_at_end": lag,
                "seconds": self.teller.finish(),
            },
        )
        path = self.options.output or self.lab.layout.report
        path.write_text(json.dumps(made.document(), indent=2) + "\n")
        show_report(self.teller, made, path)
        return made
