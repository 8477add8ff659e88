"""Devices, tokens and signatures in every row of LEDGERS."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

from coordinator.identities import Identities
from coordinator.stores import Ledger, administrators, devices, updates
from coordinator.stores.devices import Device, SecondUse
from tests.conformance.test_stores import (  # noqa: F401  # ledgers is a fixture
    Clock,
    contribution,
    create,
    ledgers,
    play,
    refusal,
    spec,
    task_of,
)
from wire.errors import Reason

DAY_US = 86_400_000_000
KEY = "k" * 64


async def do(ledger: Ledger, work: Callable[..., Any], *args: Any, timed: bool = True) -> Any:
    return await ledger.transact(lambda db, now: work(db, *args, now) if timed else work(db, *args))


async def invited(ledger: Ledger, token: str, owner: str = "ann", quota: int | None = None) -> None:
    await do(ledger, devices.invite, token, owner, quota, DAY_US)


async def enrolled(ledger: Ledger, name: str, owner: str = "ann") -> Device:
    await invited(ledger, f"for {name}", owner)
    return await do(ledger, devices.enroll, f"for {name}", name, KEY, DAY_US)  # type: ignore[no-any-return]


async def revoke(ledger: Ledger, name: str) -> None:
    await Identities(ledger, None).revoke(name)  # type: ignore[arg-type]  # revoking asks no authority


def test_of_many_who_bring_one_token_one_is_enrolled(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        other = ledgers[0]()
        await invited(ledger, "t")
        tried = await asyncio.gather(
            *[do(one, devices.enroll, "t", f"d{n}", KEY, DAY_US) for n, one in enumerate([ledger, other] * 4)],
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, Device) for outcome in tried) == 1
        assert sum(isinstance(outcome, SecondUse) for outcome in tried) == 7
        (enrolled_,) = await do(ledger, devices.every, timed=False)
        assert enrolled_.standing == "frozen"
        await other.close()

    play(ledgers, scene)


def test_a_token_expires_by_the_stores_clock_and_a_refusal_does_not_use_it_up(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await enrolled(ledger, "d1")
        await invited(ledger, "t")
        assert await refusal(do(ledger, devices.enroll, "t", "d1", "x" * 64, DAY_US)) is Reason.NAME_TAKEN
        clock.pass_s(86_399)
        await do(ledger, devices.enroll, "t", "d2", KEY, DAY_US)
        await invited(ledger, "u")
        clock.pass_s(86_401)
        assert await refusal(do(ledger, devices.enroll, "u", "d3", KEY, DAY_US)) is Reason.BAD_TOKEN
        assert await refusal(do(ledger, devices.enroll, "t", "d4", KEY, DAY_US)) is Reason.BAD_TOKEN
        assert (await do(ledger, devices.find, "d2", timed=False)).alarm is None  # an old token is no weapon

    play(ledgers, scene)


def test_a_frozen_device_gives_nothing_and_gets_nothing_until_it_is_thawed(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await invited(ledger, "t")
        await do(ledger, devices.enroll, "t", "d1", KEY, DAY_US)
        mine = contribution(await task_of(ledger, "d1"), "d1")
        await ledger.accept(mine)
        who = Identities(ledger, None)  # type: ignore[arg-type]  # what is refused is issued by no authority
        for name, key in (("d2", "x" * 64), ("d1", "x" * 64), ("d2", KEY)):
            assert await refusal(who._enroll_device("t", name, key)) is Reason.BAD_TOKEN
            assert (await ledger.status("run")).accepted == 0
            for call in (ledger.check(mine), ledger.offer("d1", ()), do(ledger, devices.renew, "d1", DAY_US)):
                assert await refusal(call) is Reason.FROZEN
            await who.thaw("d1")
        again = contribution(await task_of(ledger, "d1"), "d1")
        await ledger.accept(again)
        await who._enroll_device("t", "d1", KEY)  # its own repetition is none
        assert (await ledger.status("run")).accepted == 1

    play(ledgers, scene)


def test_a_first_alarm_is_news_and_a_second_is_not(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await enrolled(ledger, "d1")
        flagged = [await do(ledger, devices.flag, "d1", "two_addresses", timed=False) for _ in range(2)]
        assert flagged == [True, False]
        assert (await do(ledger, devices.find, "d1", timed=False)).standing == "active"
        await revoke(ledger, "d1")
        await do(ledger, devices.thaw, "d1", timed=False)
        assert (await do(ledger, devices.find, "d1", timed=False)).standing == "revoked"

    play(ledgers, scene)


def test_administrators_come_by_invitation_and_go_by_revocation(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        async def check(name: str, key: str = KEY) -> None:
            administrators.check(await do(ledger, administrators.find, name, timed=False), name, key)

        await check("admin")
        assert await refusal(check("bea")) is Reason.NOT_ENROLLED
        await do(ledger, administrators.invite, "t", "bea", DAY_US)
        assert await refusal(do(ledger, administrators.enroll, "t", "eve", KEY, DAY_US)) is Reason.BAD_TOKEN
        for _ in range(2):  # an answer may be lost
            await do(ledger, administrators.enroll, "t", "bea", KEY, DAY_US)
        await check("bea")
        assert await refusal(check("bea", "x" * 64)) is Reason.NOT_ENROLLED
        await do(ledger, administrators.revoke, "bea")
        assert await refusal(check("bea")) is Reason.REVOKED
        for call in (
            do(ledger, administrators.renew, "bea", KEY, DAY_US),
            do(ledger, administrators.enroll, "t", "bea", KEY, DAY_US),
        ):
            assert await refusal(call) is Reason.REVOKED
        await do(ledger, administrators.renew, "admin", KEY, DAY_US)
        await do(ledger, administrators.revoke, "admin")
        assert await refusal(check("admin")) is Reason.REVOKED
        assert [one.name for one in await do(ledger, administrators.every, timed=False)] == ["admin", "bea"]
        assert await refusal(do(ledger, administrators.revoke, "nobody")) is Reason.UNKNOWN_DEVICE

    play(ledgers, scene)


def test_a_device_of_another_owner_does_not_get_a_name_that_is_taken(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await enrolled(ledger, "d1")
        await invited(ledger, "t", "bob")
        assert await refusal(do(ledger, devices.enroll, "t", "d1", KEY, DAY_US)) is Reason.NAME_TAKEN

    play(ledgers, scene)


def test_a_quota_counts_devices_that_can_still_call(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await invited(ledger, "t", quota=1)
        await enrolled(ledger, "d1")
        assert await refusal(do(ledger, devices.enroll, "t", "d2", KEY, DAY_US)) is Reason.QUOTA
        await revoke(ledger, "d1")
        await do(ledger, devices.enroll, "t", "d2", KEY, DAY_US)
        clock.pass_s(86_401)
        await enrolled(ledger, "d3")  # the certificate of d2 has ended

    play(ledgers, scene)


def test_nothing_of_a_revoked_device_lands_after_its_revocation(ledgers: Any) -> None:  # noqa: F811
    """Whatever passed the gate before it: the transaction looks again."""

    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await enrolled(ledger, "d1")
        mine = contribution(await task_of(ledger, "d1"), "d1")
        await revoke(ledger, "d1")
        for call in (ledger.accept(mine), ledger.check(mine), ledger.offer("d1", ())):
            assert await refusal(call) is Reason.REVOKED
        assert await refusal(do(ledger, devices.renew, "d1", DAY_US)) is Reason.REVOKED
        status = await ledger.status("run")
        assert (status.offered, status.accepted) == (0, 0)

    play(ledgers, scene)


def test_a_revocation_takes_accepted_updates_out_of_open_rounds_and_leaves_sealed_ones(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec())
        await create(ledger, spec("full", cohort={"goal": 1}))
        for name in ("d1", "d2"):
            await enrolled(ledger, name)
        await ledger.accept(contribution(await task_of(ledger, "d1", "run"), "d1"))
        await ledger.accept(contribution(await task_of(ledger, "d1", "full"), "d1"))
        await revoke(ledger, "d1")
        await revoke(ledger, "d1")
        status = await ledger.status("run")
        assert (status.offered, status.accepted) == (0, 0)
        assert await ledger.contributions("run", 1, 1) == []
        assert [c.device for c in await ledger.contributions("full", 1, 1)] == ["d1"]
        for name in ("d2", "plain"):  # its place is free again, and the goal can be reached
            await ledger.accept(contribution(await task_of(ledger, name, "run"), name))
        assert {name for name, _ in await ledger.sealed()} == {"run", "full"}

    play(ledgers, scene)


def test_one_owner_fills_no_more_than_its_share_of_a_round(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        cohort = {"goal": 10, "minimum": 1, "deadline_s": 10.0, "owner_share": 0.2}
        await create(ledger, spec(cohort=cohort))
        for n in range(6):
            await enrolled(ledger, f"sybil-{n}", "mallory")
        offers = [await ledger.offer(f"sybil-{n}", ()) for n in range(6)]
        assert sum(offer.task is not None for offer in offers) == 2
        await ledger.accept(contribution(await task_of(ledger, "sybil-0"), "sybil-0"))
        assert (await ledger.offer("sybil-5", ())).task is None  # what was accepted counts, too
        await ledger.leave("sybil-1", "run", 1, 1)
        await task_of(ledger, "sybil-5")
        await enrolled(ledger, "honest", "ann")
        await task_of(ledger, "honest")

    play(ledgers, scene)


BUFFER = {"mode": "async", "buffer": 10, "minimum": 1, "max_staleness": 1, "deadline_s": 10.0}


def test_a_revocation_takes_an_update_out_of_the_buffer_in_which_it_counts(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(rounds=3, cohort=BUFFER | {"buffer": 2}))
        tasks = {}
        for name in ("d1", "d2", "d3", "d4"):
            await enrolled(ledger, name)
        for name in ("d1", "d2"):
            tasks[name] = await task_of(ledger, name)
        await ledger.accept(contribution(tasks["d1"], "d1"))
        await ledger.accept(contribution(tasks["d2"], "d2"))  # the buffer is full: the second one is open
        tasks["d3"] = await task_of(ledger, "d3")
        await ledger.accept(contribution(tasks["d3"], "d3"))
        await revoke(ledger, "d1")  # its update is sealed
        assert [c.device for c in await ledger.contributions("run", 1, 1)] == ["d1", "d2"]
        await revoke(ledger, "d3")
        assert await ledger.contributions("run", 2, 1) == []
        assert (await ledger.status("run")).accepted == 0
        for name in ("d4", "plain"):
            await ledger.accept(contribution(await task_of(ledger, name), name))
        assert {(name, sealed.number) for name, sealed in await ledger.sealed()} == {("run", 1)}

    play(ledgers, scene)


def test_one_owner_fills_no_more_than_its_share_of_a_buffer_whenever_its_tasks_were_given(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(rounds=3, cohort=BUFFER | {"owner_share": 0.2}))
        for n in range(8):
            await enrolled(ledger, f"sybil-{n}", "mallory")
            await enrolled(ledger, f"honest-{n}", f"owner-{n}")
        held = [await task_of(ledger, f"sybil-{n}") for n in range(2)]
        for n in range(8):
            await ledger.accept(contribution(await task_of(ledger, f"honest-{n}"), f"honest-{n}"))
        clock.pass_s(11)
        await ledger.tick()  # the first buffer is sealed without them
        late = [await ledger.offer(f"sybil-{n}", ()) for n in range(2, 8)]
        assert all(offers.task is None for offers in late)
        await ledger.accept(contribution(held[0], "sybil-0"))
        assert (await ledger.offer("sybil-7", ())).task is None
        await ledger.accept(contribution(held[1], "sybil-1"))
        assert (await ledger.offer("sybil-7", ())).task is None
        assert {c.device for c in await ledger.contributions("run", 2, 1)} == {"sybil-0", "sybil-1"}

    play(ledgers, scene)


def test_a_small_round_has_a_place_for_every_owner(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await create(ledger, spec(cohort={"goal": 2, "owner_share": 0.1}))
        await enrolled(ledger, "d1", "ann")
        await enrolled(ledger, "d2", "bob")
        await task_of(ledger, "d1")
        await task_of(ledger, "d2")

    play(ledgers, scene)


def test_a_signature_is_kept_once_under_its_release(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        for signature in ("aa", "bb"):
            await do(ledger, devices.keep_signature, "r" * 64, signature, timed=False)
        assert await do(ledger, devices.signature, "r" * 64, timed=False) == "aa"
        assert await do(ledger, devices.signature, "s" * 64, timed=False) is None

    play(ledgers, scene)


def test_an_invitation_whose_commit_was_cut_off_is_made_once(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        await invited(ledger, "t")
        await do(ledger, devices.enroll, "t", "d1", KEY, DAY_US)
        await invited(ledger, "t")  # as a ledger does that does not know whether its commit arrived
        assert isinstance(await do(ledger, devices.enroll, "t", "d2", KEY, DAY_US), SecondUse)

    play(ledgers, scene)


def test_devices_that_enrol_at_two_replicas_keep_to_their_owners_quota(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        other = ledgers[0]()
        for n in range(8):
            await invited(ledger, f"t{n}", quota=3)
        tried = await asyncio.gather(
            *[do((ledger, other)[n % 2], devices.enroll, f"t{n}", f"d{n}", KEY, DAY_US) for n in range(8)],
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, Device) for outcome in tried) == 3
        await other.close()

    play(ledgers, scene)


def test_of_a_revocation_and_an_update_at_two_replicas_the_round_keeps_neither(ledgers: Any) -> None:  # noqa: F811
    """Whichever comes first: what lands before is taken out, what comes after is refused."""

    async def scene(ledger: Ledger, clock: Clock) -> None:
        other = ledgers[0]()
        await create(ledger, spec(cohort={"goal": 9, "minimum": 1, "deadline_s": 10.0}))
        mine = []
        for n in range(6):
            await enrolled(ledger, f"d{n}")
            mine.append(contribution(await task_of(ledger, f"d{n}"), f"d{n}"))
        await asyncio.gather(
            *[other.accept(one) for one in mine],
            *[revoke(ledger, one.device) for one in mine],
            return_exceptions=True,
        )
        assert await ledger.contributions("run", 1, 1) == []
        assert ((await ledger.status("run")).offered, (await ledger.status("run")).accepted) == (0, 0)
        await other.close()

    play(ledgers, scene)


def test_owners_keep_to_their_share_at_two_replicas(ledgers: Any) -> None:  # noqa: F811
    async def scene(ledger: Ledger, clock: Clock) -> None:
        other = ledgers[0]()
        await create(ledger, spec(cohort={"goal": 10, "minimum": 1, "owner_share": 0.2}))
        for n in range(6):
            await enrolled(ledger, f"sybil-{n}", "mallory")
        offers = await asyncio.gather(*[(ledger, other)[n % 2].offer(f"sybil-{n}", ()) for n in range(6)])
        assert sum(offer.task is not None for offer in offers) == 2
        await other.close()

    play(ledgers, scene)


def test_a_device_outlives_its_ledgers_process(ledgers: Any) -> None:  # noqa: F811
    async def first(ledger: Ledger, clock: Clock) -> None:
        await enrolled(ledger, "d1")
        await revoke(ledger, "d1")

    async def second(ledger: Ledger, clock: Clock) -> None:
        found = await do(ledger, devices.find, "d1", timed=False)
        assert found == Device("d1", "ann", KEY, "revoked", clock.now_us, clock.now_us + DAY_US)
        assert dataclasses.replace(found, state="active") != found
        await ledger.transact(lambda db, now: updates.withdraw(db, "d1", now))

    play(ledgers, first)
    play(ledgers, second)
