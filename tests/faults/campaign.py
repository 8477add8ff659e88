"""`make faults`: many schedules over each kind of store, then the seeded bugs; a table of both, and 1 for any violation.

A schedule that is done is not done again, unless the program has changed since: results are kept by the digest of its source.
A bug counts as found if runs of 60 schedules show it in 95 of 100, by the share of schedules that did.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.bugs import BUGS
from tests.faults.draws import LANES, Lane

ROOT = Path(__file__).parents[2]
RUN_OF = 60
WANTED = 0.95
ENOUGH = 4
"""How often a bug is caught before the next one's turn comes."""
Outcome = dict[str, Any]


def edition() -> str:
    """A digest of all that a schedule runs."""
    whole = hashlib.sha256()
    for path in sorted(
        p for top in ("coordinator", "edge_client", "wire", "tests/faults") for p in (ROOT / top).rglob("*.py")
    ):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Campaign:
    """Outcomes lie in `folder`, a line each, and what failed in folders beside them."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / f"{edition()}.jsonl"

    def outcomes(self) -> list[Outcome]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def play(
        self, lane: Lane, seeds: Sequence[int], bug: str | None = None, enough: int | None = None
    ) -> Iterator[Outcome]:
        """Those that are done already first, then the others; until `enough` have failed."""
        failed, done = 0, {o["seed"]: o for o in self.outcomes() if (o["store"], o["bug"]) == (lane, bug)}
        for outcome in self._each(lane, seeds, bug, done):
            failed += bool(outcome["violations"])
            yield outcome
            if enough is not None and failed >= enough:
                return

    def _each(self, lane: Lane, seeds: Sequence[int], bug: str | None, done: dict[int, Outcome]) -> Iterator[Outcome]:
        yield from (done[seed] for seed in seeds if seed in done)
        if not (left := [seed for seed in seeds if seed not in done]):
            return
        line = [
            sys.executable,
            "-m",
            "tests.faults.schedules",
            "--store",
            lane,
            "--folder",
            str(self.folder / "failed"),
        ]
        line += ["--seeds", ",".join(map(str, left)), *(["--bug", bug] if bug else ["--seaweed"])]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    with self.results.open("a") as kept:
                        kept.write(text)
                    yield json.loads(text)
            finally:
                process.terminate()
                process.stdout.read()  # what it was about to say, it may still say
        if process.returncode not in (0, 1, 143):
            raise SystemExit(f"the schedules over {lane} ended with {process.returncode}")


def lanes_of(schedules: int) -> dict[Lane, range]:
    """How many seeds each lane plays: as many as the other."""
    return {lane: range((schedules + at) // len(LANES)) for at, lane in enumerate(LANES)}


def played(campaign: Campaign, schedules: int) -> list[Outcome]:
    """The schedules of all lanes, side by side."""
    with tqdm(total=schedules, desc="schedules", unit="") as bar, ThreadPoolExecutor(len(LANES)) as pool:

        def one(lane: Lane, seeds: range) -> list[Outcome]:
            found = []
            for outcome in campaign.play(lane, seeds):
                found.append(outcome)
                bar.update()
            return found

        futures = [pool.submit(one, lane, seeds) for lane, seeds in lanes_of(schedules).items()]
        return [outcome for future in futures for outcome in future.result()]


def bugs_found(campaign: Campaign) -> list[dict[str, Any]]:
    """Of each bug how many schedules were played, and how many caught it."""
    rows = []
    for name in tqdm(sorted(BUGS), desc="bugs", unit=""):
        caught = played_ = 0
        for lane in BUGS[name].stores:
            for outcome in campaign.play(
                lane, range(RUN_OF // len(BUGS[name].stores)), name, ENOUGH // len(BUGS[name].stores)
            ):
                played_ += 1
                caught += bool(outcome["violations"])
        share = 1 - (1 - caught / played_) ** RUN_OF
        rows.append({"bug": name, "schedules": played_, "caught": caught, "in_a_run_of_60": round(share, 4)})
    return rows


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """A row a lane."""
    rows = []
    for lane in LANES:
        own = [outcome for outcome in outcomes if outcome["store"] == lane]
        faults = sum((Counter(outcome["faults"]) for outcome in own), Counter[str]())
        rows.append(
            {
                "store": lane,
                "schedules": len(own),
                "rounds": sum(outcome["rounds"] for outcome in own),
                "receipts": sum(outcome["receipts"] for outcome in own),
                "violations": sum(len(outcome["violations"]) for outcome in own),
                "pairs": len({pair for outcome in own for pair in outcome["pairs"]}),
                "seconds": round(sum(outcome["seconds"] for outcome in own)),
                "faults": dict(sorted(faults.items())),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Columns as wide as what is in them."""
    shown = [{key: str(value) for key, value in row.items() if not isinstance(value, dict)} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    lines = [dict(zip(widths, widths, strict=True)), *shown]
    return "\n".join("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines)


def report(lanes: list[dict[str, Any]], bugs: list[dict[str, Any]], failed: list[Outcome]) -> str:
    kinds = sorted({kind for row in lanes for kind in row["faults"]})
    faults = [{"fault": kind, **{row["store"]: row["faults"].get(kind, 0) for row in lanes}} for kind in kinds]
    parts = [table(part) for part in (lanes, faults, bugs) if part]
    parts += [f"seed {one['seed']} over {one['store']}: {'; '.join(one['violations'])}" for one in failed]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--schedules", type=int, default=1000, help="of all stores together")
    parser.add_argument("--no-bugs", action="store_true", help="leave the seeded bugs out")
    parser.add_argument("--folder", type=Path, default=ROOT / "faults-out", help="where outcomes are kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(args.folder)
    outcomes = played(campaign, args.schedules)
    lanes, failed = summary(outcomes), [outcome for outcome in outcomes if outcome["violations"]]
    bugs = [] if args.no_bugs else bugs_found(campaign)
    print(json.dumps({"stores": lanes, "bugs": bugs, "failed": failed}) if args.json else report(lanes, bugs, failed))
    missed = [row["bug"] for row in bugs if row["in_a_run_of_60"] < WANTED]
    sys.exit(1 if failed or missed else 0)


if __name__ == "__main__":
    main()
