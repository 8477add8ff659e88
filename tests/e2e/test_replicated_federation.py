"""A federation over PostgreSQL and S3: two replicas on one port, killed in the middle of rounds, and the database too."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from coordinator.stores import Place
from edge_client.transport import Connection
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts, write_toy_spec
from tests.servers import S3, Postgres

CLIENTS, ROUNDS = 4, 6


def test_replicas_and_a_database_that_crash_in_the_middle_of_rounds_lose_nothing_and_count_nothing_twice(
    tmp_path: Path, postgres_server: Postgres, s3_server: S3
) -> None:
    place = Place.of(postgres_server.fresh(), s3_server.fresh())
    with CoordinatorProcess(place.ledger, "127.0.0.1:0", "--blobs", place.blobs, "--replicas", "2") as together:
        spec = write_toy_spec(
            tmp_path / "spec.toml",
            rounds=ROUNDS,
            goal=CLIENTS,
            local_steps=30,
            learning_rate=0.002,
            codec="top_k_int4",
        )
        created = edgetune("run", "create", spec, "--coordinator", together.address)
        assert created.returncode == 0, created.stderr
        clients = [
            start_client(
                together.address, write_texts(tmp_path / f"{n}.jsonl", f"word{n}"), tmp_path / f"d{n}", name=f"d{n}"
            )
            for n in range(CLIENTS)
        ]
        crash_in_rounds(together, postgres_server)
        journals = {f"d{n}": told for n, told in enumerate(finished(clients))}
    receipts = {
        (event["round"], device)
        for device, told in journals.items()
        for event in told
        if event["event"] == "submitted" and event["kind"] == "train"
    }
    sent = sum(e["event"] == "submitted" and e["kind"] == "train" for told in journals.values() for e in told)
    assert sent == len(receipts)
    assert (
        receipts == asyncio.run(counted(place)) == {(r, f"d{n}") for r in range(1, ROUNDS + 1) for n in range(CLIENTS)}
    )
    verified = edgetune("run", "verify", "toy", "--store", place.ledger, "--blobs", place.blobs, "--json")
    assert verified.returncode == 0, verified.stderr
    assert [r["contributions"] for r in json.loads(verified.stdout)["releases"]] == [0] + [CLIENTS] * ROUNDS
    swept = edgetune("coordinator", "gc", "--store", place.ledger, "--blobs", place.blobs, "--grace", "1h", "--json")
    assert swept.returncode == 0 and json.loads(swept.stdout)["blobs"] == 0


def crash_in_rounds(together: CoordinatorProcess, database: Postgres) -> None:
    """kill -9 of one replica, a crash of the database, kill -9 of the other replica, each time a round is half full."""
    crashes: list[Callable[[], None]] = [lambda: kill(together, 1), database.crash, lambda: kill(together, 2)]
    for number, crash in enumerate(crashes):
        with Connection(together.address) as connection:
            next(s for s in connection.watch("toy") if s.round >= 2 * number + 1 and 0 < s.accepted < CLIENTS)
        crash()


def kill(together: CoordinatorProcess, replica: int) -> None:
    os.kill(together.replicas[replica], signal.SIGKILL)
    together.event("replica_ended")
    together.event("replica_started")


async def counted(place: Place) -> set[tuple[int, str]]:
    """(round, device) of every update that a release is made of, as the ledger and the manifests agree on it."""
    ledger = place.open(create=False).ledger
    found = set()
    for version in range(1, ROUNDS + 1):
        release = await ledger.release("toy", version)
        rows = await ledger.contributions("toy", version, await ledger.attempt("toy", version))
        assert [(c.device, c.digest) for c in rows] == [(s.device, s.digest) for s in release.contributions]
        found |= {(version, c.device) for c in rows}
    await ledger.close()
    return found
