"""`make faults`: many schedules over each kind of store, then the seeded bugs; a table of both, and 1 for any violation.

A schedule that is done is not done again, unless the program has changed since: results are kept by the digest of its source.
A bug counts as found if runs of 60 schedules catch it in 95 of 100, by a lower bound of the share of schedules that did.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.faults.bugs import BUGS
from tests.faults.draws import LANES, Lane

ROOT = Path(__file__).parents[2]
RUN_OF = 60
WANTED = 0.95
LIMIT = math.log(20)
"""Evidence that is wrong in one case of 20."""
MOST = 180
"""Schedules after which a bug is not shown to be found."""
ABREAST = 3
"""Schedules of one store at a time: two cores play six. More would only wait for each other, past every deadline."""
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

    def play(self, lane: Lane, seeds: Sequence[int], bug: str | None = None) -> Generator[Outcome]:
        """Those that are done already first, then the others."""
        done = {o["seed"]: o for o in self.outcomes() if (o["store"], o["bug"]) == (lane, bug)}
        return self._each(lane, seeds, bug, done)

    def _each(self, lane: Lane, seeds: Sequence[int], bug: str | None, done: dict[int, Outcome]) -> Generator[Outcome]:
        yield from (done[seed] for seed in seeds if seed in done)
        if not (left := [seed for seed in seeds if seed not in done]):
            return
        line = [sys.executable, "-m", "tests.faults.schedules", "--store", lane, "--abreast", str(ABREAST)]
        line += ["--seeds", ",".join(map(str, left)), "--folder", str(self.folder / "failed")]
        line += ["--bug", bug] if bug else []
        told = 0
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    with self.results.open("a") as kept:
                        kept.write(text)
                    told += 1
                    yield json.loads(text)
            finally:
                process.terminate()
                process.stdout.read()  # what it was about to say, it may still say
        if told < len(left):  # a failed schedule is an outcome, too: what is missing was not played
            raise SystemExit(f"the schedules over {lane} ended after {told} of {len(left)}: what it said stands above")


def lanes_of(schedules: int) -> dict[Lane, range]:
    """How many seeds each lane plays: as many as the other."""
    return {lane: range((schedules + at) // len(LANES)) for at, lane in enumerate(LANES)}


def played(campaign: Campaign, schedules: int) -> list[Outcome]:
    """The schedules of all lanes, side by side."""
    parts = lanes_of(schedules).items()
    with tqdm(total=schedules, desc="schedules", unit="") as bar, ThreadPoolExecutor(len(parts)) as pool:

        def one(part: tuple[Lane, range]) -> list[Outcome]:
            found = []
            for outcome in campaign.play(*part):
                found.append(outcome)
                bar.update()
            return found

        return [outcome for found in pool.map(one, parts) for outcome in found]


def at_least(caught: int, played: int) -> float:
    """A lower bound of the share that is caught, with 95 % confidence at whatever moment one stops to look: the end of a
    confidence sequence (Robbins 1970), for a uniform prior."""

    def evidence(share: float) -> float:
        """Against this share, as the logarithm of a likelihood ratio."""
        beta = math.lgamma(caught + 1) + math.lgamma(played - caught + 1) - math.lgamma(played + 2)
        return beta - caught * math.log(share) - (played - caught) * math.log1p(-share)

    low, high = 1e-9, max(caught / max(played, 1), 1e-9)
    if not caught or evidence(low) < LIMIT:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if evidence(min(middle, 1 - 1e-12)) >= LIMIT else (low, middle)
    return low


def in_a_run(share: float) -> float:
    """How likely a run of 60 schedules catches what each catches with the chance `share`."""
    return float(1 - (1 - share) ** RUN_OF)


def bug_found(campaign: Campaign, name: str) -> dict[str, Any]:
    """Schedules of all stores in turn, until it is shown that runs of 60 catch this bug, or there were too many."""
    stores = BUGS[name].stores
    with contextlib.ExitStack() as ends:
        parts = [campaign.play(lane, range(MOST // len(stores)), name) for lane in stores]
        for part in parts:
            ends.callback(part.close)
        caught = count = 0
        for outcome in itertools.chain.from_iterable(zip(*parts, strict=True)):
            count, caught = count + 1, caught + bool(outcome["violations"])
            if in_a_run(at_least(caught, count)) >= WANTED:
                break
    bound = at_least(caught, count)
    row = {"bug": name, "schedules": count, "caught": caught, "share": round(caught / count, 3)}
    return row | {"share_at_least": round(bound, 3), "in_a_run_of_60_at_least": round(in_a_run(bound), 3)}


def bugs_found(campaign: Campaign, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a bug."""
    return [bug_found(campaign, name) for name in tqdm(names, desc="bugs", unit="")]


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
    parser.add_argument("--bugs", nargs="*", default=sorted(BUGS), metavar="BUG", help="these alone; or none")
    parser.add_argument("--folder", type=Path, default=ROOT / "faults-out", help="where outcomes are kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(args.folder)
    outcomes = played(campaign, args.schedules)
    lanes, failed = summary(outcomes), [outcome for outcome in outcomes if outcome["violations"]]
    bugs = bugs_found(campaign, args.bugs)
    print(json.dumps({"stores": lanes, "bugs": bugs, "failed": failed}) if args.json else report(lanes, bugs, failed))
    missed = [row["bug"] for row in bugs if row["in_a_run_of_60_at_least"] < WANTED]
    sys.exit(1 if failed or missed else 0)


if __name__ == "__main__":
    main()
