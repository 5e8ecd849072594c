"""A region dies with work that it acknowledged alone, comes back, and people look after its salvage."""

from __future__ import annotations

from pathlib import Path

from controller.domain.promotion import State
from controller.errors import DrError
from controller.lab.virtual_time import run_virtual
from controller.runtime.salvage_documents import SalvagePiece, SalvageRecord
from controller.runtime.salvager import Salvager
from tests.simulation.checkers import check_all, live_history, lost_acks, settle
from tests.simulation.roads import Call
from tests.simulation.world import HOME, TARGET, THIRD, World


async def everything(salvager: Salvager) -> tuple[SalvagePiece, list[SalvageRecord]]:
    (found,) = await salvager.list(HOME)
    (piece,) = found.pieces
    records: list[SalvageRecord] = []
    after = 0
    while True:
        page = await salvager.page(HOME, piece.name, after, None)
        assert page.damaged == ()
        records += page.records
        after = page.after
        if not after:
            return piece, records


def test_what_was_lost_is_listed_exactly_taken_out_whole_and_discarded_although_the_holder_dies(keys_dir: Path) -> None:
    async def story() -> None:
        world = World(keys_dir)
        await world.served(agents=6, seconds=10.0)
        world.isolate_stores_of(HOME)
        await world.wait(1.5)
        await world.lose_region(HOME)
        before = list(world.acks)
        await world.until(lambda: bool(world.pager.pages), 30, "a page")
        await world.reached(await world.order("failover", TARGET), State.DONE)
        lost = {(ack.agent, ack.id): ack.body for ack in lost_acks(world, live_history(world))}
        assert lost
        world.bring_back(HOME)

        async def home_is_back() -> bool:
            status = await world.actives()[0].controller.status()
            (home,) = (region for region in status.regions if region.region == HOME)
            return home.protected is True and bool(home.salvage)

        await world.until(home_is_back, 60, "the old region as a standby with its salvage")
        for region in (TARGET, THIRD, HOME):  # whoever is asked
            salvager = world.standby(region).salvager
            piece, records = await everything(salvager)
            alone = {(one.agent, one.id): one for one in records if one.state in ("only", "other")}
            acknowledged = {(ack.agent, ack.id) for ack in before}
            assert alone.keys() & acknowledged == lost.keys()
            for key, body in lost.items():
                one = alone[key]
                assert await salvager.body(HOME, piece.name, one.seq, one.ordinal) == body
        died: list[str] = []

        async def before_effect(call: Call) -> None:
            if call.op == "delete_diverged" and not died:
                died.append(call.instance.key)
                world.die(call.instance)

        with world.effects(before=before_effect):
            digest = ""
            for attempt in range(20):
                active = world.actives()[0] if world.actives() else None
                try:
                    if active is not None:
                        salvager = active.controller.salvager
                        dry = await salvager.discard(
                            HOME, piece.name, execute=False, confirm="", requester="", digest="", even_unexported=""
                        )
                        digest = dry.digest or digest
                        done = await world.ask(
                            active,
                            salvager.discard(
                                HOME, piece.name, execute=True, confirm=HOME, requester="ada", digest=digest, even_unexported=""
                            ),
                        )
                        if done.state in ("done", "gone"):
                            break
                except DrError:
                    assert attempt < 19
                await world.wait(5)
        assert died
        head = world.servers[HOME].head(piece.stream)
        assert head.salvage == ()
        there = {(ref.seq, ref.epoch) for ref in world.servers[HOME].objects if ref.stream == piece.stream}
        assert not there & {(one.seq, one.epoch) for one in records}
        check_all(world)
        await settle(world)

    run_virtual(story(), limit_seconds=900)
