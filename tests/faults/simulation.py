"""Deterministic simulation: one seed, one plan, one trace.

python -m tests.faults.simulation --seed N            one plan, with its trace
python -m tests.faults.simulation --seeds 10000       many, on all processors; those that fail are shrunk and shown
python -m tests.faults.simulation --mistake NAME      the same, with a seeded bug
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gc
import hashlib
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

from coordinator.bell import Bell
from coordinator.stores import Store
from tests.faults import invariants
from tests.faults.mistakes import MISTAKES
from tests.faults.plans import Plan, plan
from tests.faults.virtual import Life
from tests.faults.world import Ledger, World, replaced, seams


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one plan: what went wrong, what happened, and how its run ended."""

    seed: int
    faults: list[str]
    trace: list[str]
    state: str

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


def simulate(planned: Plan, mistake: str | None = None) -> Outcome:
    """Let a plan happen, and look at what is left of the store."""
    gc.collect(0)
    gc.disable()  # what it frees, and when, must not depend on what this process did before
    world = World(planned)
    try:
        with replaced(seams(world) + (MISTAKES[mistake]() if mistake else [])):
            world.loop.run_until_complete(world.live())
            state = world.loop.run_until_complete(_judged(world))
            told = Outcome(planned.seed, list(world.faults), list(world.loop.trace), state)
            world.close()
        return told
    finally:
        gc.enable()


async def _judged(world: World) -> str:
    """Reads the store as a coordinator does that starts when all others have ended."""
    judge = Life("judge", world.loop)
    store = Store(Ledger(world, judge, Bell()), cast(Any, world.blobs_of(judge)))
    for fault in await invariants.violations(store, world.receipts, ended=True):
        world.wrong(fault)
    return (await store.ledger.status(world.run.name)).state


def shrunk(failing: Plan, mistake: str | None = None) -> Plan:
    """A failure with so few operations that without any one of them there is none."""
    for op in failing.ops:
        fewer = dataclasses.replace(failing, ops=tuple(kept for kept in failing.ops if kept is not op))
        if simulate(fewer, mistake).faults:
            return shrunk(fewer, mistake)
    return failing


def outcomes(seeds: Sequence[int], mistake: str | None = None) -> Iterator[Outcome]:
    """On all processors, in order."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn) as pool:
        yield from pool.map(functools.partial(_outcome, mistake=mistake), seeds, chunksize=20)


def _outcome(seed: int, mistake: str | None) -> Outcome:
    """Without its trace, which would have to travel."""
    return dataclasses.replace(simulate(plan(seed), mistake), trace=[])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulation")
    parser.add_argument("--seed", type=int, help="one plan, with its trace")
    parser.add_argument("--seeds", type=int, default=500, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--mistake", choices=sorted(MISTAKES), help="with a seeded bug")
    args = parser.parse_args()
    if args.seed is not None:
        return _one(args.seed, args.mistake)
    return _many(range(args.first, args.first + args.seeds), args.mistake)


def _one(seed: int, mistake: str | None) -> int:
    outcome = simulate(plan(seed), mistake)
    print(*outcome.trace, f"trace {outcome.digest}", f"the run is {outcome.state}", *outcome.faults, sep="\n")
    return 1 if outcome.faults else 0


def _many(seeds: Sequence[int], mistake: str | None) -> int:
    began, states, failed = time.monotonic(), collections.Counter[str](), 0
    for outcome in outcomes(seeds, mistake):
        states[outcome.state] += 1
        if outcome.faults:
            failed += 1
            least = shrunk(plan(outcome.seed), mistake)
            print(f"seed {outcome.seed}:", *outcome.faults[:5], *least.ops, sep="\n  ", flush=True)
    ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(f"{len(seeds)} seeds in {time.monotonic() - began:.0f} s: {failed} with a fault; runs: {ended}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
