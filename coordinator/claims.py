"""Whose store it is: the first coordinator with identities writes its own down, and no process with others, or with none,
serves that store from then on."""

from __future__ import annotations

import asyncio
import dataclasses

from coordinator.authority import Authority
from coordinator.closing import PASSING
from coordinator.stores import Ledger
from coordinator.stores.connection import Connection
from wire import certificates
from wire.errors import IdentityError, Refused

LOOK_S = 1.0
"""How often a process without identities looks whether somebody with identities has come."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """`authority` is the SHA-256 of its certificate, `release_key` what verifies its releases; hexadecimal both."""

    authority: str
    release_key: str

    @classmethod
    def of(cls, authority: Authority) -> Claim:
        return cls(certificates.fingerprint(authority.certificate).hex(), authority.release_key)


async def check(ledger: Ledger, authority: Authority | None) -> None:
    """Claim a store that nobody has claimed. Raises IdentityError where it is another's."""
    mine = Claim.of(authority) if authority else None
    found = await (
        ledger.look(_read) if mine is None else ledger.transact(lambda db, now_us: _claimed(db, mine, now_us))
    )
    if found == mine:
        return
    assert found is not None, "a store without a claim has just been claimed"
    whose = f"this store belongs to a coordinator with identities (authority {found.authority[:12]}…)"
    folder = f"{authority.folder} is another one" if authority else "none was named"
    raise IdentityError(f"{whose}, and {folder}: give the folder that its `coordinator init` made as --identity")


async def stay_unclaimed(ledger: Ledger) -> None:
    """For ever, for a process without identities: raises IdentityError once the store is somebody's."""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            await check(ledger, None)
        except Refused as error:
            if error.reason not in PASSING:
                raise


def _claimed(db: Connection, mine: Claim, now_us: int) -> Claim | None:
    insert = "INSERT INTO claims (id, authority, release_key) VALUES (1, ?, ?) ON CONFLICT (id) DO NOTHING"
    db.execute(insert, (mine.authority, mine.release_key))
    return _read(db, now_us)


def _read(db: Connection, now_us: int) -> Claim | None:
    row = db.execute("SELECT authority, release_key FROM claims").fetchone()
    return Claim(*row) if row else None
