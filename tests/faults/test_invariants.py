"""The checker of stores: each thing that can be wrong with one is said."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.stores import Place
from tests.faults import crashes, invariants
from tests.faults.crashes import RUN, federation
from wire import run_spec, spec
from wire.messages import Receipt

Harm = Callable[[Path], None]


def sql(*statements: str) -> Harm:
    def harm(folder: Path) -> None:
        with sqlite3.connect(folder / "store" / "ledger.sqlite") as db:
            for statement in statements:
                db.execute(statement)
        db.close()

    return harm


def a_blob_is_cut(folder: Path) -> None:
    digest = invariants.receipts([folder / "journal"])[0].digest
    (folder / "store" / "blobs" / digest[:2] / digest).write_bytes(b"cut")


def all_blobs_are_gone(folder: Path) -> None:
    for path in (folder / "store" / "blobs").glob("??/*"):
        path.unlink()


def a_receipt_nobody_gave(folder: Path) -> None:
    invariants.note(folder / "journal", Receipt(RUN.name, 1, 1, "d9", "f" * 64))


def a_receipt_for_other_bytes(folder: Path) -> None:
    invariants.note(folder / "journal", Receipt(RUN.name, 1, 1, "d1", "f" * 64))


def a_receipt_of_another_run(folder: Path) -> None:
    invariants.note(folder / "journal", Receipt("other", 1, 1, "d1", "f" * 64))


FIRST = "WHERE number = 1 AND device = 'd1'"
HARM: dict[str, Harm] = {
    "a receipt without an update": a_receipt_nobody_gave,
    "two receipts for one task": a_receipt_for_other_bytes,
    "a receipt of a run that is gone": a_receipt_of_another_run,
    "it has other bytes": a_blob_is_cut,
    "it is not there": all_blobs_are_gone,
    "round 1 (attempt 1) says 2 updates and has 1": sql(f"DELETE FROM contributions {FIRST}"),
    "release 1 is not made of what its round accepted": sql(f"UPDATE contributions SET device = 'd3' {FIRST}"),
    "computed again, it differs": sql(f"UPDATE contributions SET weight = 7 {FIRST}"),
    "the releases are not those of the published attempts": sql("DELETE FROM releases WHERE version = 2"),
    "the releases have a gap": sql("UPDATE releases SET version = 3 WHERE version = 2"),
    "does not end: it is running": sql("UPDATE runs SET state = 'running'"),
    "still waits: it is sealed": sql("UPDATE rounds SET state = 'sealed' WHERE number = 2"),
    "rounds and attempts have a gap": sql("UPDATE rounds SET attempt = 2 WHERE number = 1"),
    "after one that was not abandoned": sql(
        "INSERT INTO rounds SELECT run, number, 2, kind, base_version, goal, minimum, offers, length_us, 'abandoned',"
        " deadline_us, 0, 0, paused_us, max_staleness FROM rounds WHERE number = 1"
    ),
    "closed with 2 updates, for a goal of 1": sql("UPDATE rounds SET goal = 1 WHERE number = 1"),
    "broke the rule of its deadline": sql(f"UPDATE contributions SET accepted_us = accepted_us + 3600000000 {FIRST}"),
    "says 5 parts are held": sql("UPDATE rounds SET state = 'open', offered = 5 WHERE number = 2"),
    "says 9 of 9 bytes and has 0": sql("INSERT INTO uploads VALUES ('aa', 'run', 1, 1, 'd1', 'x', 9, 9, 0)"),
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place.of(str(tmp_path / "store"), None)
    asyncio.run(federation(made, tmp_path / "journal"))
    return made


def said_of(place: Place, folder: Path) -> list[str]:
    return asyncio.run(invariants.violations_at(place, [folder / "journal"], ended=True))


def test_nothing_is_wrong_with_a_store_that_nobody_harmed(place: Place, tmp_path: Path) -> None:
    assert said_of(place, tmp_path) == []


@pytest.mark.parametrize("sentence", HARM)
def test_what_is_wrong_with_a_store_is_said(sentence: str, place: Place, tmp_path: Path) -> None:
    HARM[sentence](tmp_path)
    assert any(sentence in said for said in said_of(place, tmp_path)), said_of(place, tmp_path)


def test_what_a_release_with_a_coded_delta_is_made_of_is_read_from_its_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = run_spec.parse(spec.plain(RUN) | {"downlink": {"codec": "top_k_int4_5"}})
    monkeypatch.setattr(crashes, "RUN", coded)
    made = Place.of(str(tmp_path / "store"), None)
    asyncio.run(federation(made, tmp_path / "journal"))
    assert said_of(made, tmp_path) == []
    sql(f"UPDATE contributions SET device = 'd3' {FIRST}")(tmp_path)
    assert "release 1 is not made of what its round accepted" in said_of(made, tmp_path)
