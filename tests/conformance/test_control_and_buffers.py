"""What a person does with a run, and runs in buffers: one suite for every row of LEDGERS."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from coordinator import pacing
from coordinator.rounds import Round
from coordinator.stores import Ask, Ledger, Offers, schema
from tests.conformance.test_stores import (
    LAYOUT,
    Clock,
    contribution,
    create,
    ledgers,
    play,
    refusal,
    release_after,
    sealed_round,
    spec,
    task_of,
)
from wire.errors import Reason, Refused
from wire.messages import ReleaseManifest
from wire.run_spec import RunSpec
from wire.spec import canonical

__all__ = ["ledgers"]
ROUNDS = {"goal": 2, "minimum": 1, "deadline_s": 10.0}


def buffers(rounds: int = 3, **cohort: Any) -> RunSpec:
    table = {"mode": "async", "buffer": 2, "max_staleness": 1, "deadline_s": 10.0, "over_selection": 2.0}
    return spec(rounds=rounds, cohort=table | cohort)


async def give(ledger: Ledger, device: str, digest: str = "d" * 64) -> None:
    await ledger.accept(contribution(await task_of(ledger, device), device, digest))


async def publish(ledger: Ledger, made: Round) -> bool:
    parent = await ledger.release("run", made.base_version)
    run = (await ledger.run("run")).spec
    release = ReleaseManifest(
        "run", made.number, run.digest, LAYOUT.digest, parent.digest, f"{made.number:064x}", None, ()
    )
    return await ledger.publish("run", made, release)


async def publish_all(ledger: Ledger) -> list[int]:
    """The numbers of what was sealed, in the order in which it could be published."""
    order = []
    while sealed := await ledger.sealed():
        [(_, oldest)] = sealed
        assert await publish(ledger, oldest)
        order.append(oldest.number)
    return order


def test_a_paused_run_hands_nothing_out_and_its_deadline_stands_still_but_updates_under_way_count(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort=ROUNDS))
        task = await task_of(ledger, "d1")
        clock.pass_s(4)
        await ledger.control("run", "pause", "lunch")
        clock.pass_s(100)
        assert await ledger.tick() == []
        offers = await ledger.offer("d2", ())
        assert (offers.task, offers.active, offers.ended, offers.work_in_s) == (None, 1, (), None)
        await ledger.accept(contribution(task, "d1"))
        status = await ledger.status("run")
        assert (status.state, status.detail, status.accepted) == ("paused", "lunch", 1)
        await ledger.control("run", "resume", "")
        assert (await task_of(ledger, "d2")).deadline_s == pytest.approx(6.0)
        assert ((await ledger.status("run")).state, (await ledger.status("run")).detail) == ("running", "")
        clock.pass_s(7)
        assert [name for name, _ in await ledger.tick()] == ["run"]

    play(ledgers, scene)


def test_a_round_that_was_overdue_when_its_run_was_paused_takes_no_more_updates_and_ends(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort=ROUNDS))
        task = await task_of(ledger, "d1")
        clock.pass_s(11)
        await ledger.control("run", "pause", "")
        assert await refusal(ledger.accept(contribution(task, "d1"))) is Reason.ROUND_CLOSED
        assert [name for name, _ in await ledger.tick()] == ["run"]
        assert ((await ledger.status("run")).attempt, (await ledger.status("run")).state) == (2, "paused")

    play(ledgers, scene)


def test_what_opens_while_a_run_is_paused_is_paused(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort=ROUNDS, rounds=2))
        sealed = await sealed_round(ledger)
        await ledger.control("run", "pause", "")
        assert await publish(ledger, sealed)
        assert (await ledger.offer("d1", ())).task is None
        await ledger.control("run", "resume", "")
        assert (await task_of(ledger, "d1")).round == 2

    play(ledgers, scene)


def test_a_buffer_that_fills_while_the_run_is_paused_opens_the_next_paused(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers())
        under_way = [(device, await task_of(ledger, device)) for device in ("d1", "d2")]
        await ledger.control("run", "pause", "")
        for device, task in under_way:
            await ledger.accept(contribution(task, device))
        assert await publish_all(ledger) == [1]
        assert (await ledger.offer("d3", ())).task is None
        await ledger.control("run", "resume", "")
        assert (await task_of(ledger, "d3")).round == 2

    play(ledgers, scene)


def test_pausing_resuming_and_stopping_twice_is_once(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort=ROUNDS))
        await task_of(ledger, "d1")
        await ledger.control("run", "resume", "")
        await ledger.control("run", "pause", "first")
        clock.pass_s(5)
        await ledger.control("run", "pause", "second")
        assert (await ledger.status("run")).detail == "first"
        for _ in range(2):
            await ledger.control("run", "resume", "")
        assert (await task_of(ledger, "d1")).deadline_s == pytest.approx(10.0)
        for _ in range(2):
            await ledger.control("run", "stop", "enough")
        assert ((await ledger.status("run")).state, (await ledger.status("run")).detail) == ("stopped", "enough")

    play(ledgers, scene)


def test_a_stopped_run_takes_nothing_more_but_publishes_what_was_sealed(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec("open", cohort=ROUNDS))
        late = contribution(await task_of(ledger, "d1", "open"), "d1")
        await ledger.control("open", "stop", "")
        assert await refusal(ledger.accept(late)) is Reason.ROUND_CLOSED
        assert (await ledger.offer("d1", ("open",))).ended == ("open",)
        await create(ledger, spec(cohort=ROUNDS, rounds=2))
        sealed = await sealed_round(ledger)
        await ledger.control("run", "stop", "")
        assert await publish(ledger, sealed)
        assert (await ledger.release("run", None)).version == 1
        assert (await ledger.offer("d1", ("run",))).ended == ("run",)
        assert (await ledger.rounds_by_state()) == {"abandoned": 1, "published": 1}

    play(ledgers, scene)


def test_a_run_that_is_over_or_unknown_cannot_be_controlled_and_a_reason_is_one_line(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        assert await refusal(ledger.control("run", "pause", "")) is Reason.UNKNOWN_RUN
        await create(ledger, spec(cohort=ROUNDS))
        for reason in ("two\nlines", "\x1b[2J", "x" * 201):
            assert await refusal(ledger.control("run", "stop", reason)) is Reason.BAD_REQUEST
        await ledger.control("run", "stop", "")
        for action in ("pause", "resume"):
            with pytest.raises(Refused, match=f"'run' has ended: it is stopped, and too late to {action} it") as caught:
                await ledger.control("run", action, "")
            assert caught.value.reason is Reason.RUN_ENDED

    play(ledgers, scene)


def test_a_buffer_that_cannot_be_combined_ends_the_run_and_closes_the_open_one(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers())
        await give(ledger, "d1")
        await give(ledger, "d2")
        [(_, first)] = await ledger.sealed()
        task = await task_of(ledger, "d3")
        assert await ledger.fail("run", first, "it diverged")
        assert not await ledger.fail("run", first, "again")
        assert not await publish(ledger, first)
        status = await ledger.status("run")
        assert (status.state, status.detail, await ledger.sealed()) == ("failed", "it diverged", [])
        with pytest.raises(Refused) as refusal:
            await ledger.accept(contribution(task, "d3", "d" * 64))
        assert refusal.value.reason is Reason.ROUND_CLOSED

    play(ledgers, scene)


def test_a_full_buffer_opens_the_next_at_once_and_buffers_are_published_in_order(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers())
        for device in ("d1", "d2", "d3", "d4"):
            await give(ledger, device)
        [(_, first)] = await ledger.sealed()
        assert (first.number, (await ledger.status("run")).round) == (1, 3)
        second = dataclasses.replace(first, number=2, base_version=1)
        stray = ReleaseManifest("run", 2, "", "", "", "c" * 64, None, ())
        assert not await ledger.publish("run", second, stray)
        assert await publish_all(ledger) == [1, 2]
        await give(ledger, "d1")
        await give(ledger, "d2")
        assert await publish_all(ledger) == [3]
        assert (await task_of(ledger, "d1")).kind == "evaluate"

    play(ledgers, scene)


def test_a_slow_device_counts_in_a_later_buffer_with_its_staleness_and_too_slow_a_one_is_refused(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(rounds=9, over_selection=3.0))
        slow, slower = await task_of(ledger, "slow"), await task_of(ledger, "slower")
        for device in ("d1", "d2"):
            await give(ledger, device)
        await publish_all(ledger)
        assert await task_of(ledger, "slow") == dataclasses.replace(slow, deadline_s=0.0)
        mine = contribution(slow, "slow")
        receipt = await ledger.accept(mine)
        await give(ledger, "d1")
        await publish_all(ledger)
        assert await ledger.accept(mine) == receipt == await ledger.check(mine)
        landed = {c.device: (c.round, c.staleness) for c in await ledger.contributions("run", 2, 1)}
        assert landed == {"d1": (2, 0), "slow": (1, 1)}
        late = contribution(slower, "slower")
        assert await refusal(ledger.check(late)) is await refusal(ledger.accept(late)) is Reason.STALE_RELEASE
        assert (await task_of(ledger, "slower")).release_version == 2

    play(ledgers, scene)


def test_a_device_gives_one_update_a_buffer(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(over_selection=3.0))
        first = await task_of(ledger, "d1")
        for device in ("d2", "d3"):
            await give(ledger, device)
        await ledger.leave("d1", "run", first.round, first.attempt)
        second = await task_of(ledger, "d1")
        assert (first.round, second.round) == (1, 2)
        await ledger.accept(contribution(second, "d1"))
        assert (await ledger.offer("d1", ())).task is None
        assert await refusal(ledger.accept(contribution(first, "d1"))) is Reason.NOT_ASSIGNED

    play(ledgers, scene)


def test_two_tasks_of_one_device_do_not_both_count_in_one_buffer(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(rounds=9, over_selection=3.0, max_staleness=0))
        stale = await task_of(ledger, "d1")
        for device in ("d2", "d3"):
            await give(ledger, device)
        await publish_all(ledger)
        await give(ledger, "d1")
        assert await refusal(ledger.accept(contribution(stale, "d1"))) is Reason.CONFLICTING_UPDATE

    play(ledgers, scene)


def test_nobody_is_handed_a_release_that_is_too_old_already(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(max_staleness=0))
        for device in ("d1", "d2"):
            await give(ledger, device)
        assert (await ledger.offer("d3", ())).task is None
        await publish_all(ledger)
        assert (await task_of(ledger, "d3")).release_version == 1

    play(ledgers, scene)


def test_a_buffer_seals_at_its_deadline_and_below_its_minimum_keeps_what_it_has(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(buffer=4, minimum=2))
        await give(ledger, "d1")
        under_way = await task_of(ledger, "d2")
        clock.pass_s(11)
        assert [name for name, _ in await ledger.tick()] == ["run"]
        assert (await ledger.status("run")).accepted == 1
        assert (await task_of(ledger, "d3")).attempt == 2
        await ledger.accept(contribution(under_way, "d2"))
        clock.pass_s(11)
        await ledger.tick()
        [(_, sealed)] = await ledger.sealed()
        assert [c.device for c in await ledger.contributions("run", 1, sealed.attempt)] == ["d1", "d2"]

    play(ledgers, scene)


def test_an_update_that_comes_between_the_deadline_and_its_notice_still_counts_in_a_buffer(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(minimum=1))
        task = await task_of(ledger, "d1")
        clock.pass_s(11)
        await ledger.accept(contribution(task, "d1"))
        assert [name for name, _ in await ledger.tick()] == ["run"]
        [(_, sealed)] = await ledger.sealed()
        assert sealed.accepted == 1

    play(ledgers, scene)


def test_however_many_openings_race_every_receipt_is_in_exactly_one_buffer(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(rounds=100, buffer=4, over_selection=6.0, max_staleness=10))
        openings = [ledger, ledgers[0](), ledgers[0]()]
        tasks = [(f"d{n:02}", await task_of(ledger, f"d{n:02}")) for n in range(22)]
        await asyncio.gather(*[openings[n % 3].accept(contribution(t, d)) for n, (d, t) in enumerate(tasks)])
        held = [[c.device for c in await ledger.contributions("run", number, 1)] for number in range(1, 7)]
        assert [len(devices) for devices in held] == [4, 4, 4, 4, 4, 2]
        assert sorted(device for devices in held for device in devices) == [device for device, _ in tasks]
        assert await publish_all(ledger) == [1, 2, 3, 4, 5]
        for other in openings[1:]:
            await other.close()

    play(ledgers, scene)


def test_a_stopped_buffered_run_refuses_late_updates_and_publishes_its_sealed_ones(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, buffers(over_selection=3.0))
        late = contribution(await task_of(ledger, "d9"), "d9")
        for device in ("d1", "d2"):
            await give(ledger, device)
        await ledger.control("run", "stop", "")
        assert await refusal(ledger.accept(late)) is Reason.ROUND_CLOSED
        assert await publish_all(ledger) == [1]
        with pytest.raises(Refused):
            await ledger.control("run", "resume", "")

    play(ledgers, scene)


def test_whoever_asks_first_is_not_taken_for_it(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        created = spec(cohort=ROUNDS | {"goal": 4}, rounds=9)
        await create(ledger, created)
        devices = [f"d{n:02}" for n in range(12)]
        for asked in (devices, devices[::-1]):
            answers = await ledger.offer_together([Ask(device, ()) for device in asked])
            tasks = [d for d, answer in zip(asked, answers, strict=True) if isinstance(answer, Offers) and answer.task]
            wanted = sorted(devices, key=lambda d: pacing.lot(created.seed, "run", 1, 1, d))[:4]
            assert sorted(tasks) == sorted(wanted)

    play(ledgers, scene)


def test_one_of_many_that_asks_for_what_is_not_there_is_refused_alone(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort=ROUNDS))
        good, bad = await ledger.offer_together([Ask("d1", ("run",)), Ask("d2", ("nowhere",))])
        assert isinstance(good, Offers) and good.task is not None
        assert isinstance(bad, Refused) and bad.reason is Reason.UNKNOWN_RUN

    play(ledgers, scene)


def test_a_full_round_says_when_there_will_be_work_at_the_latest(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort=ROUNDS | {"goal": 1}))
        await task_of(ledger, "d1")
        clock.pass_s(3)
        assert (await ledger.offer("d2", ())).work_in_s == pytest.approx(7.0)

    play(ledgers, scene)


def test_a_ledger_from_before_buffers_goes_on_where_it_was(ledgers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    released, old = schema.scripts(), spec(cohort=ROUNDS)
    texts = (canonical(old).decode(), canonical(LAYOUT).decode(), old.digest, LAYOUT.digest)

    async def before(ledger: Ledger, clock: Clock) -> None:
        def write(db: Any) -> None:
            db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, 'running', '', 1)", ("run", *texts))
            manifest = ReleaseManifest.first(old, LAYOUT, "a" * 64)
            values = ("run", 0, manifest.digest, canonical(manifest).decode(), 0, 1)
            db.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?)", values)
            columns = "run, number, attempt, kind, base_version, goal, minimum, offers, length_us, state, deadline_us"
            db.execute(
                f"INSERT INTO rounds ({columns}, offered, accepted)"
                " VALUES ('run', 1, 1, 'train', 0, 2, 1, 2, 10000000, 'open', 11000000, 1, 0)"
            )
            db.execute("INSERT INTO assignments VALUES ('run', 1, 1, 'd1', 'offered')")

        await ledger._write(write)  # type: ignore[attr-defined]  # every row is an SqlLedger

    async def now(ledger: Ledger, clock: Clock) -> None:
        sealed = await sealed_round(ledger)
        assert await ledger.publish("run", sealed, await release_after(ledger, old))
        assert (await ledger.status("run")).round == 2

    monkeypatch.setattr(schema, "scripts", lambda: released[:2])
    play(ledgers, before)
    monkeypatch.setattr(schema, "scripts", lambda: released)
    play(ledgers, now)
