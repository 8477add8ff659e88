"""A store that has identities is served by nobody without them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from coordinator import authority, claims
from coordinator.stores import Ledger
from tests.conformance.test_stores import Clock, ledgers, play  # noqa: F401  # ledgers is a fixture
from tests.processes import CoordinatorProcess, edgetune
from wire.errors import IdentityError, Reason, Refused

HOSTS = ["localhost", "127.0.0.1"]


def test_of_two_authorities_that_come_at_once_one_has_the_store(ledgers: Any, tmp_path: Path) -> None:  # noqa: F811
    ours, theirs = (authority.create(tmp_path / name, HOSTS) for name in ("ours", "theirs"))

    async def scene(ledger: Ledger, clock: Clock) -> None:
        other = ledgers[0]()
        await claims.check(ledger, None)
        asked = [(ledger, ours), (other, theirs)] * 3
        told = await asyncio.gather(*[claims.check(one, who) for one, who in asked], return_exceptions=True)
        assert told.count(None) == 3 and sum(isinstance(one, IdentityError) for one in told) == 3
        with pytest.raises(IdentityError, match="none was named"):
            await claims.check(other, None)
        await other.close()

    play(ledgers, scene)


@pytest.mark.parametrize("together", [(), ("--replicas", "2")], ids=["alone", "replicas"])
def test_other_identities_or_none_are_refused_at_the_start(together: tuple[str, ...], tmp_path: Path) -> None:
    store = tmp_path / "store"
    ours, theirs = (authority.create(tmp_path / name, HOSTS).folder for name in ("ours", "theirs"))
    with CoordinatorProcess(store, identity=ours):
        pass
    serve: tuple[str | Path, ...] = ("coordinator", "serve", "--store", store, "--listen", "127.0.0.1:0", *together)
    others: list[tuple[tuple[str | Path, ...], str]] = [
        (("--identity", theirs), "is another one"),
        ((), "none was named"),
    ]
    for named, why in others:
        refused = edgetune(*serve, *named, timeout_s=60)
        assert refused.returncode == 2 and "belongs to" in refused.stderr and why in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    with CoordinatorProcess(store, "127.0.0.1:0", *together, identity=ours) as again:
        assert again.stop() == 0


def test_a_process_without_identities_ends_soon_after_somebody_has_claimed_its_store(tmp_path: Path) -> None:
    ours = authority.create(tmp_path / "ours", HOSTS).folder
    with CoordinatorProcess(tmp_path / "store") as plain, CoordinatorProcess(tmp_path / "store", identity=ours):
        assert plain.process.wait(20) == 2


def test_a_store_that_does_not_answer_or_has_no_room_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception] = [
        Refused(Reason.BUSY, "not now"),
        Refused(Reason.DISK_FULL, "full"),
        IdentityError("claimed"),
    ]

    async def check(ledger: Ledger, authority: object) -> None:
        raise answers.pop(0)

    monkeypatch.setattr(claims, "LOOK_S", 0.001)
    monkeypatch.setattr(claims, "check", check)
    with pytest.raises(IdentityError, match="claimed"):
        asyncio.run(asyncio.wait_for(claims.stay_unclaimed(None), 10))  # type: ignore[arg-type]  # nobody asks it
