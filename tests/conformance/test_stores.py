"""One suite for every row of LEDGERS and of BLOBS."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator import publish
from coordinator.stores import BLOBS, LEDGERS, Ask, Blobs, Ledger, Offers, schema, uploads
from coordinator.stores.connection import Connection
from wire import run_spec
from wire.delta import Layout, Tensor
from wire.errors import MachineError, Reason, Refused
from wire.messages import Contribution, Metrics, ReleaseManifest, Task
from wire.run_spec import RunSpec

BASE = "b" * 64
LAYOUT = Layout((Tensor("w", (4,)),))


class Clock:
    """A store's clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now_us = 1_000_000

    def __call__(self, db: Connection) -> int:
        return self.now_us

    def pass_s(self, seconds: float) -> None:
        self.now_us += int(seconds * 1e6)


def row(table: Any, name: str) -> Any:
    module, cls = table[name].split(":")
    return getattr(importlib.import_module(module), cls)


def ledger_place(name: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Where a row may keep an empty ledger; skips by name where its server has no build for this platform."""
    if name == "sqlite":
        return str(folder)
    return str(request.getfixturevalue("postgres_server").fresh())


def blob_place(name: str, request: pytest.FixtureRequest, folder: Path) -> tuple[str, ...]:
    """What a row of BLOBS is made with, where there are none yet."""
    if name == "memory":
        return ()
    return (str(folder / "blobs") if name == "files" else request.getfixturevalue("s3_server").fresh(),)


def spec(name: str = "run", **changes: Any) -> RunSpec:
    table: dict[str, Any] = {
        "name": name,
        "base": {"model": "toy", "format": "toy", "digest": BASE},
        "rounds": 1,
        "cohort": {"goal": 2, "minimum": 1, "deadline_s": 10.0},
        "method": {"id": "lora"},
        "codec": "float32",
    }
    return run_spec.parse(table | changes)


def contribution(task: Task, device: str, digest: str = "d" * 64, **changes: Any) -> Contribution:
    table: dict[str, Any] = {
        "device": device,
        "run": task.run,
        "round": task.round,
        "attempt": task.attempt,
        "digest": digest,
        "size": 36 if digest else 0,
        "weight": 3,
        "base_digest": BASE,
        "release_digest": task.release_digest,
        "metrics": Metrics(loss_before=2.0, held_out_tokens=10),
    }
    return Contribution(**table | changes)


@pytest.fixture(params=sorted(LEDGERS))
def ledgers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Ledger], Clock]:
    clock, place = Clock(), ledger_place(request.param, request, tmp_path)
    return (lambda: row(LEDGERS, request.param)(place, clock)), clock


Scene = Callable[[Ledger, Clock], Awaitable[None]]


def play(ledgers: tuple[Callable[[], Ledger], Clock], scene: Scene) -> None:
    async def run() -> None:
        ledger = ledgers[0]()
        try:
            await scene(ledger, ledgers[1])
        finally:
            await ledger.close()

    asyncio.run(run())


async def create(ledger: Ledger, created: RunSpec) -> None:
    await ledger.create_run(created, LAYOUT, publish.initial(created, LAYOUT, "a" * 64))


async def task_of(ledger: Ledger, device: str, *runs: str) -> Task:
    offers = await ledger.offer(device, runs)
    assert offers.task is not None
    return offers.task


async def refusal(call: Awaitable[Any]) -> Reason:
    with pytest.raises(Refused) as caught:
        await call
    return caught.value.reason


async def sealed_round(ledger: Ledger) -> Any:
    for device in ("d1", "d2"):
        await ledger.accept(contribution(await task_of(ledger, device), device))
    [(name, sealed)] = await ledger.sealed()
    assert name == "run"
    return sealed


async def release_after(ledger: Ledger, created: RunSpec) -> Any:
    parent = await ledger.release(created.name, 0)
    return ReleaseManifest(created.name, 1, created.digest, LAYOUT.digest, parent.digest, "c" * 64, None, ())


def test_creating_the_same_run_again_changes_nothing_and_another_of_its_name_is_refused(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await create(ledger, spec())
        assert await ledger.names() == ["run"]
        assert await refusal(create(ledger, spec(seed=7))) is Reason.RUN_EXISTS

    play(ledgers, scene)


def test_what_was_written_is_there_after_reopening(ledgers: Any) -> None:
    async def first(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await ledger.accept(contribution(await task_of(ledger, "d1"), "d1"))

    async def second(ledger: Ledger, clock: Clock) -> None:
        assert (await ledger.run("run")).spec == spec()
        assert (await ledger.status("run")).accepted == 1
        assert [c.device for c in await ledger.contributions("run", 1, 1)] == ["d1"]

    play(ledgers, first)
    play(ledgers, second)


def test_two_openings_of_one_store_see_each_other(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        other = ledgers[0]()
        await create(ledger, spec())
        task = await task_of(other, "d1")
        await ledger.accept(contribution(task, "d1"))
        assert (await other.status("run")).accepted == 1
        await other.close()

    play(ledgers, scene)


def test_a_device_that_asks_again_gets_the_same_task_and_no_second_place(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        first = await task_of(ledger, "d1")
        clock.pass_s(1)
        again = await task_of(ledger, "d1")
        assert (again.round, again.attempt) == (first.round, first.attempt)
        assert again.deadline_s == pytest.approx(first.deadline_s - 1)
        assert (await ledger.status("run")).offered == 1

    play(ledgers, scene)


def test_a_full_round_offers_nothing_and_says_how_many_runs_are_going(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        for device in ("d1", "d2"):
            await task_of(ledger, device)
        offers = await ledger.offer("d3", ())
        assert (offers.task, offers.active, offers.ended) == (None, 1, ())

    play(ledgers, scene)


def test_runs_are_tried_in_the_order_asked_for(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec("one"))
        await create(ledger, spec("two"))
        assert (await task_of(ledger, "d1", "two", "one")).run == "two"
        assert await refusal(ledger.offer("d1", ("three",))) is Reason.UNKNOWN_RUN

    play(ledgers, scene)


def test_a_task_given_back_makes_room_and_giving_back_twice_does_not_make_more(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await task_of(ledger, "d1")
        for _ in range(2):
            await ledger.leave("d1", "run", 1, 1)
        assert (await ledger.status("run")).offered == 0
        await task_of(ledger, "d1")

    play(ledgers, scene)


def test_the_same_contribution_again_gives_the_same_receipt_even_when_the_round_is_over(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        mine = contribution(await task_of(ledger, "d1"), "d1")
        receipt = await ledger.accept(mine)
        assert await ledger.accept(mine) == receipt
        clock.pass_s(20)
        await ledger.tick()
        assert await ledger.accept(mine) == receipt == await ledger.check(mine)
        assert (await ledger.status("run")).accepted == 1

    play(ledgers, scene)


def test_other_bytes_under_the_same_key_are_a_conflict(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        task = await task_of(ledger, "d1")
        await ledger.accept(contribution(task, "d1"))
        assert await refusal(ledger.accept(contribution(task, "d1", "e" * 64))) is Reason.CONFLICTING_UPDATE

    play(ledgers, scene)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "stranger"}, Reason.NOT_ASSIGNED),
        ({"run": "nowhere"}, Reason.UNKNOWN_RUN),
        ({"round": 9}, Reason.NOT_ASSIGNED),
        ({"attempt": 9}, Reason.NOT_ASSIGNED),
        ({"base_digest": "f" * 64}, Reason.WRONG_BASE),
        ({"release_digest": "f" * 64}, Reason.WRONG_BASE),
        ({"digest": "", "size": 0}, Reason.BAD_REQUEST),
    ],
)
def test_a_contribution_with_a_wrong_name_is_refused_and_nothing_is_counted(
    ledgers: Any, changes: dict[str, Any], reason: Reason
) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        mine = dataclasses.replace(contribution(await task_of(ledger, "d1"), "d1"), **changes)
        assert await refusal(ledger.accept(mine)) is reason
        assert (await ledger.status("run")).accepted == 0

    play(ledgers, scene)


def test_an_abandoned_round_refuses_its_updates_and_opens_the_next_attempt(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort={"goal": 2, "minimum": 2, "deadline_s": 10.0, "max_attempts": 2}))
        late = contribution(await task_of(ledger, "d1"), "d1")
        clock.pass_s(11)
        assert [name for name, _ in await ledger.tick()] == ["run"]
        assert await ledger.tick() == []
        assert await refusal(ledger.accept(late)) is Reason.ROUND_CLOSED
        assert (await task_of(ledger, "d1")).attempt == 2
        clock.pass_s(11)
        await ledger.tick()
        status = await ledger.status("run")
        assert (status.state, "missed its minimum 2 times" in status.detail) == ("failed", True)
        assert (await ledger.offer("d1", ())).ended == ("run",)

    play(ledgers, scene)


def test_publishing_is_a_compare_and_swap_that_one_caller_wins(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        sealed = await sealed_round(ledger)
        release = await release_after(ledger, spec())
        won = await asyncio.gather(*[ledger.publish("run", sealed, release) for _ in range(5)])
        assert sorted(won) == [False] * 4 + [True]
        assert await ledger.release("run", None) == release
        assert await ledger.attempt("run", 1) == 1
        assert await ledger.sealed() == []

    play(ledgers, scene)


def test_the_last_release_is_evaluated_and_then_the_run_is_done(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await ledger.publish("run", await sealed_round(ledger), await release_after(ledger, spec()))
        for device, loss in (("d1", 1.0), ("d2", 4.0)):
            task = await task_of(ledger, device)
            assert task.kind == "evaluate"
            metrics = Metrics(loss_before=loss, held_out_tokens=10 if device == "d1" else 30)
            await ledger.accept(contribution(task, device, "", metrics=metrics))
        status = await ledger.status("run")
        assert status.state == "done"
        assert status.releases[1].held_out_loss == pytest.approx(3.25)
        assert status.releases[0].held_out_loss == pytest.approx(2.0)
        assert status.releases[0].held_out_tokens == 20

    play(ledgers, scene)


def test_refusals_are_counted_by_reason(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        for _ in range(3):
            await ledger.refuse("run", Reason.NOT_FINITE)
        await ledger.refuse("nowhere", Reason.NOT_FINITE)
        assert (await ledger.status("run")).refused == {"NOT_FINITE": 3}

    play(ledgers, scene)


def test_unknown_names_are_refused(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        assert await refusal(ledger.run("x")) is Reason.UNKNOWN_RUN
        assert await refusal(ledger.status("x")) is Reason.UNKNOWN_RUN
        assert await refusal(ledger.release("x", None)) is Reason.UNKNOWN_RELEASE

    play(ledgers, scene)


def test_what_another_opening_changes_is_heard_soon_and_what_it_only_reads_is_not(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        other, heard = ledgers[0](), asyncio.Event()

        async def listen() -> None:
            async for _ in ledger.others():
                heard.set()

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0.5)  # until it listens
        await other.names()
        await create(ledger, spec("own"))
        await asyncio.sleep(0.5)
        assert not heard.is_set()
        await create(other, spec())
        await asyncio.wait_for(heard.wait(), 2.0)
        listening.cancel()
        await other.close()

    play(ledgers, scene)


def test_of_what_another_opening_does_that_is_told_apart_which_may_be_work_for_those_who_wait(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        other, heard = ledgers[0](), list[bool]()

        async def listen() -> None:
            async for may_be_work in ledger.others():
                heard.append(may_be_work)

        async def may_be_work(doing: Awaitable[Any]) -> bool:
            heard.clear()
            await doing
            await asyncio.sleep(0.5)
            assert heard
            return any(heard)

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0.5)  # until it listens
        assert await may_be_work(create(other, spec()))
        first, second = await task_of(other, "d1"), await task_of(other, "d2")
        assert not await may_be_work(other.refuse("run", Reason.NOT_FINITE))
        assert not await may_be_work(other.accept(contribution(first, "d1")))
        assert await may_be_work(other.leave("d2", "run", 1, 1))
        assert not await may_be_work(task_of(other, "d2"))
        assert await may_be_work(other.control("run", "pause", ""))
        assert await may_be_work(other.control("run", "resume", ""))
        assert not await may_be_work(other.accept(contribution(second, "d2")))
        [(_, sealed)] = await other.sealed()
        assert await may_be_work(other.publish("run", sealed, await release_after(other, spec())))
        listening.cancel()
        await other.close()

    play(ledgers, scene)


def test_a_replica_of_an_earlier_edition_leaves_alone_what_it_cannot_read(
    ledgers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec("plain"))
        await create(ledger, spec("buffered", cohort={"mode": "async", "buffer": 1, "max_staleness": 0}))
        for name in ("plain", "buffered"):
            task = await task_of(ledger, f"to-{name}", name)
            if name == "buffered":
                await ledger.accept(contribution(task, "to-buffered"))
        monkeypatch.setattr(run_spec, "EDITION", 1)
        clock.pass_s(11.0)
        assert await ledger.names() == ["plain"] == [name for name, _ in await ledger.tick()]
        assert await ledger.sealed() == []
        assert await refusal(ledger.run("buffered")) is await refusal(ledger.status("buffered")) is Reason.BUSY
        assert (await task_of(ledger, "d1")).run == "plain"
        assert (await ledger.offer("d1", ("buffered",))).active == 1
        monkeypatch.undo()
        assert [name for name, _ in await ledger.sealed()] == ["buffered"]

    play(ledgers, scene)


def test_a_device_of_an_earlier_edition_is_refused_only_where_there_is_nothing_it_can_read(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec("buffered", cohort={"mode": "async", "buffer": 1, "max_staleness": 0}))
        [refused] = await ledger.offer_together([Ask("old", (), 1)])
        assert isinstance(refused, Refused) and refused.reason is Reason.TOO_OLD
        await create(ledger, spec("plain"))
        answers = await ledger.offer_together(
            [Ask("old", (), 1), Ask("old", ("buffered",), 1), Ask("new", ("buffered",))]
        )
        assert isinstance(answers[0], Offers) and answers[0].task is not None and answers[0].task.run == "plain"
        assert isinstance(answers[1], Refused) and "'buffered' needs" in str(answers[1])
        assert isinstance(answers[2], Offers) and answers[2].task is not None

    play(ledgers, scene)


def test_a_running_replica_goes_on_when_a_newer_one_has_added_columns(ledgers: Any) -> None:
    def widen(db: Connection, now_us: int) -> None:
        for table in ("runs", "rounds", "assignments", "contributions", "releases", "refusals", "uploads"):
            db.execute(f"ALTER TABLE {table} ADD COLUMN later INTEGER")  # constants

    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await ledger.refuse("run", Reason.NOT_FINITE)
        newer = ledgers[0]()
        await newer.transact(widen)
        await newer.close()
        await create(ledger, spec("run2"))
        await ledger.refuse("run", Reason.NOT_FINITE)
        sealed = await sealed_round(ledger)
        assert await ledger.publish("run", sealed, await release_after(ledger, spec()))
        assert (await ledger.status("run")).refused == {"NOT_FINITE": 2}

    play(ledgers, scene)


def test_every_insert_names_its_columns_so_that_a_newer_replica_may_add_some() -> None:
    sources = Path(schema.__file__).parent.glob("*.py")
    bare = re.compile(r"INSERT INTO (?!schema_version)\w+ VALUES|SELECT \*")
    assert [path.name for path in sources if bare.search(path.read_text())] == []


def test_no_update_lands_after_the_seal_however_many_openings_race(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        cohort = {"goal": 8, "minimum": 1, "deadline_s": 10.0, "over_selection": 3.0}
        await create(ledger, spec(cohort=cohort))
        openings = [ledger, ledgers[0](), ledgers[0]()]
        tasks = [(f"d{n:02}", await task_of(ledger, f"d{n:02}")) for n in range(24)]
        outcomes = await asyncio.gather(
            *[openings[n % 3].accept(contribution(task, device)) for n, (device, task) in enumerate(tasks)],
            return_exceptions=True,
        )
        receipts = sorted(o.device for o in outcomes if not isinstance(o, BaseException))
        refusals = [o.reason for o in outcomes if isinstance(o, Refused)]
        assert (len(receipts), refusals) == (8, [Reason.ROUND_CLOSED] * 16)
        assert [c.device for c in await ledger.contributions("run", 1, 1)] == receipts
        assert (await ledger.status("run")).accepted == 8
        for other in openings[1:]:
            await other.close()

    play(ledgers, scene)


def test_every_blob_that_a_row_names_is_named(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await ledger.publish("run", await sealed_round(ledger), await release_after(ledger, spec()))
        assert await ledger.named_blobs() == {"a" * 64, "c" * 64, "d" * 64}

    play(ledgers, scene)


def test_text_that_no_column_can_hold_is_refused_and_harms_nothing(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        with contextlib.suppress(Refused):
            await ledger.refuse("a\0b", Reason.BAD_SIZE)
        for name in ("a\0b", "x' OR '1'='1", "%s", "?"):
            with pytest.raises(Refused):
                await ledger.run(name)
        assert await ledger.names() == ["run"]

    play(ledgers, scene)


def set_version(ledger: Ledger, version: int) -> Awaitable[None]:
    """Write a schema version by hand, as a newer program would have left it."""

    def write(db: Connection) -> None:
        if type(ledger).__name__ == "SqliteLedger":
            db.execute(f"PRAGMA user_version = {version}")
        else:
            db.execute("UPDATE schema_version SET version = ?", (version,))

    done: Awaitable[None] = ledger._write(write)  # type: ignore[attr-defined]  # every row is an SqlLedger
    return done


def test_a_ledger_of_a_newer_schema_is_refused_and_left_as_it_is(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await set_version(ledger, 99)
        with pytest.raises(MachineError, match="newer edgetune"):
            ledgers[0]()
        await set_version(ledger, len(schema.scripts()))
        assert await ledger.names() == ["run"]

    play(ledgers, scene)


def test_an_older_ledger_is_migrated_whole_or_not_at_all(ledgers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    released = schema.scripts()

    async def old(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())

    async def new(ledger: Ledger, clock: Clock) -> None:
        assert await ledger.names() == ["run"]
        await task_of(ledger, "d1")

    play(ledgers, old)
    broken = "CREATE TABLE half (x INTEGER);\nCREATE TABLE runs (y INTEGER);\n"
    monkeypatch.setattr(schema, "scripts", lambda: (*released, broken))
    with pytest.raises(MachineError):
        ledgers[0]()
    monkeypatch.setattr(schema, "scripts", lambda: (*released, "CREATE TABLE half (x INTEGER);\n"))
    play(ledgers, new)  # only if nothing of the broken migration has stayed
    play(ledgers, new)  # and each script is run once


def begun(ledger: Ledger, mine: Contribution, name: str, most: int = 2, keep_s: float = 5.0) -> Awaitable[Any]:
    keep_us = int(keep_s * 1e6)
    return ledger.transact(lambda db, now_us: uploads.create(db, mine, name, most, 100, keep_us, now_us))


def appended(ledger: Ledger, name: str, start: int, size: int) -> Awaitable[int]:
    digest = f"{start:064}"
    return ledger.transact(lambda db, now_us: uploads.append(db, name, start, size, digest, 5_000_000, now_us))


def test_the_same_contribution_gets_the_same_upload_as_far_as_it_has_come(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        mine = contribution(await task_of(ledger, "d1"), "d1")
        assert await begun(ledger, mine, "one") == uploads.Upload("one", "d1", 36, 0)
        assert await appended(ledger, "one", 0, 20) == 20
        other = ledgers[0]()
        assert await begun(other, mine, "two") == uploads.Upload("one", "d1", 36, 20)
        assert await refusal(begun(other, dataclasses.replace(mine, size=35), "two")) is Reason.BAD_SIZE
        await other.close()

    play(ledgers, scene)


def test_of_parts_that_race_for_one_offset_one_is_named(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await begun(ledger, contribution(await task_of(ledger, "d1"), "d1"), "one")
        openings = [ledger, ledgers[0](), ledgers[0]()]
        racing = [appended(openings[n % 3], "one", 0, 9) for n in range(9)]
        outcomes = await asyncio.gather(*racing, return_exceptions=True)
        lost = [o for o in outcomes if isinstance(o, Refused)]
        assert outcomes.count(9) == 1 and {(o.reason, o.offset) for o in lost} == {(Reason.WRONG_OFFSET, 9)}
        assert await ledger.look(lambda db, _: uploads.parts(db, "one")) == [f"{0:064}"]
        assert await refusal(appended(ledger, "one", 8, 9)) is Reason.WRONG_OFFSET
        assert await refusal(appended(ledger, "none", 0, 9)) is Reason.UNKNOWN_UPLOAD
        for other in openings[1:]:
            await other.close()

    play(ledgers, scene)


def test_an_upload_of_a_buffers_task_goes_on_while_a_later_buffer_would_take_it(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        cohort = {
            "mode": "async",
            "buffer": 1,
            "minimum": 1,
            "max_staleness": 1,
            "deadline_s": 10.0,
            "over_selection": 3,
        }
        await create(ledger, spec(rounds=9, cohort=cohort))
        slow = contribution(await task_of(ledger, "slow"), "slow", "e" * 64)
        await begun(ledger, slow, "one", keep_s=60.0)

        def found() -> Awaitable[Any]:
            return ledger.look(lambda db, now_us: uploads.find(db, "one", "slow", now_us))

        for number in (1, 2):
            assert (await found()).id == "one"
            await ledger.accept(contribution(await task_of(ledger, f"d{number}"), f"d{number}"))
        assert await refusal(found()) is Reason.STALE_RELEASE

    play(ledgers, scene)


def test_a_device_has_as_many_uploads_and_bytes_as_it_may_and_those_given_up_do_not_count(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        task = await task_of(ledger, "d1")
        for number in range(2):
            await begun(ledger, contribution(task, "d1", f"{number:064}"), f"u{number}")
        third = contribution(task, "d1", "c" * 64)
        assert await refusal(begun(ledger, third, "u2")) is Reason.TOO_MANY_UPLOADS
        assert await refusal(begun(ledger, third, "u2", most=9)) is Reason.TOO_MANY_UPLOADS  # 108 bytes of 100
        await begun(ledger, contribution(await task_of(ledger, "d2"), "d2"), "other")
        clock.pass_s(6)
        assert (await begun(ledger, third, "u2")).id == "u2"

    play(ledgers, scene)


def test_what_is_given_up_is_forgotten_with_its_parts_and_what_is_not_is_named(ledgers: Any) -> None:
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        task = await task_of(ledger, "d1")
        given_up, alive = contribution(task, "d1"), contribution(task, "d1", "e" * 64)
        await begun(ledger, given_up, "old")
        await appended(ledger, "old", 0, 9)
        clock.pass_s(4)
        await begun(ledger, alive, "new")
        await appended(ledger, "new", 0, 9)
        await appended(ledger, "new", 9, 9)
        clock.pass_s(2)
        assert await ledger.transact(uploads.forget_expired) == [f"{0:064}"]
        assert await ledger.transact(uploads.forget_expired) == []
        assert await ledger.look(lambda db, _: uploads.of(db, given_up)) is None
        assert await ledger.named_blobs() == {"a" * 64, f"{0:064}", f"{9:064}"}
        assert await ledger.transact(lambda db, _: uploads.forget_of(db, alive)) == [f"{0:064}", f"{9:064}"]
        assert await ledger.named_blobs() == {"a" * 64}

    play(ledgers, scene)


@pytest.fixture(params=sorted(BLOBS))
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    made: Blobs = row(BLOBS, request.param)(*blob_place(request.param, request, tmp_path))
    return made


DATA = bytes(range(256)) * 9
DIGEST = hashlib.sha256(DATA).hexdigest()


def test_blobs_come_back_under_their_digest_and_putting_them_twice_keeps_one(blobs: Blobs) -> None:
    assert blobs.put(DATA) == blobs.put(memoryview(DATA)) == DIGEST
    assert (bytes(blobs.get(DIGEST)), blobs.size(DIGEST), list(blobs.digests())) == (DATA, len(DATA), [DIGEST])


def store(blobs: Blobs, data: bytes, digest: str, size: int) -> None:
    with blobs.writer(digest, size) as writer:
        writer.write(data)
        writer.commit()


def test_an_empty_blob_is_a_blob(blobs: Blobs) -> None:
    assert bytes(blobs.get(blobs.put(b""))) == b""


def test_a_large_blob_comes_back_in_parts_as_it_went(blobs: Blobs) -> None:
    data = hashlib.shake_128(b"large").digest(5 << 20)
    digest = hashlib.sha256(data).hexdigest()
    with blobs.writer(digest, len(data)) as writer:
        for start in range(0, len(data), 1 << 20):
            writer.write(data[start : start + (1 << 20)])
        assert writer.commit() == digest
    assert hashlib.sha256(blobs.get(digest)).hexdigest() == digest


def test_what_is_deleted_is_gone_and_deleting_it_again_is_nothing(blobs: Blobs) -> None:
    kept = blobs.put(b"kept")
    blobs.put(DATA)
    assert set(blobs.older(3600.0)) == set() and set(blobs.older(-3600.0)) == {DIGEST, kept}
    for _ in range(2):
        blobs.delete(DIGEST)
    assert list(blobs.digests()) == [kept]


def test_a_blob_that_is_not_there_is_refused(blobs: Blobs) -> None:
    for call in (blobs.get, blobs.size):
        with pytest.raises(Refused) as caught:
            call(DIGEST)
        assert caught.value.reason is Reason.UNKNOWN_BLOB


def test_nothing_is_visible_before_the_commit_nor_left_behind_without_one(blobs: Blobs) -> None:
    with blobs.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA)
        assert list(blobs.digests()) == []
    assert list(blobs.digests()) == []


@pytest.mark.parametrize(
    ("digest", "size", "reason"),
    [
        (DIGEST, len(DATA) - 1, Reason.BAD_SIZE),
        (DIGEST, len(DATA) + 1, Reason.BAD_SIZE),
        ("0" * 64, len(DATA), Reason.BAD_DIGEST),
    ],
)
def test_a_blob_that_is_not_what_was_declared_is_refused(blobs: Blobs, digest: str, size: int, reason: Reason) -> None:
    with pytest.raises(Refused) as caught:
        store(blobs, DATA, digest, size)
    assert caught.value.reason is reason
    assert list(blobs.digests()) == []


GROWING = "0" * 32


def grows(blobs: Blobs) -> bool:
    blobs.grow(GROWING)
    with blobs.growing(GROWING) as blob:
        return blob is not None


def test_a_blob_that_grows_ends_where_it_was_last_written_and_is_found_by_its_digest_when_it_is_finished(
    blobs: Blobs,
) -> None:
    if not grows(blobs):
        return
    with blobs.growing(GROWING) as blob:
        assert blob is not None and blob.size() == 0
        blob.write(0, DATA[:100])
        blob.write(100, b"what nobody was told of, and is longer than what follows" * 50)
        blob.write(100, DATA[100:])
        blob.sync()
        assert blob.size() == len(DATA) and bytes(blobs.get(GROWING)) == DATA
        blob.finish(DIGEST)
    blobs.grow(GROWING)
    assert set(blobs.digests()) == {GROWING, DIGEST} and blobs.size(GROWING) == len(DATA)
    blobs.delete(GROWING)
    assert bytes(blobs.get(DIGEST)) == DATA
    with blobs.growing(GROWING) as blob:
        assert blob is None


def test_a_blob_that_grows_is_held_by_one_at_a_time(blobs: Blobs) -> None:
    if not grows(blobs):
        return
    with blobs.growing(GROWING), pytest.raises(Refused) as caught, blobs.growing(GROWING):
        pass
    assert caught.value.reason is Reason.BUSY and caught.value.retry_after_s
    with blobs.growing(GROWING) as blob:
        assert blob is not None
