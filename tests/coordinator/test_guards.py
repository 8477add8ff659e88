"""Places where callers are served at once."""

from __future__ import annotations

import asyncio

from coordinator.guards import turn


def test_a_caller_who_has_stopped_to_read_is_in_the_way_of_others_for_a_while_and_not_for_ever() -> None:
    async def scene() -> None:
        places, ever = asyncio.Semaphore(2), asyncio.Event()

        async def stalled() -> None:
            async with turn(places, 0.2):
                await ever.wait()

        callers = [asyncio.create_task(stalled()) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert places.locked()
        async with asyncio.timeout(5), turn(places, 0.2):
            assert not any(caller.done() for caller in callers)
        ever.set()
        await asyncio.gather(*callers)

    asyncio.run(scene())


def test_a_place_is_given_back_once_whoever_leaves_it_early_late_or_by_an_error() -> None:
    async def scene() -> None:
        places = asyncio.Semaphore(1)
        for seconds in (0.0, 0.1):
            async with turn(places, 0.05):
                await asyncio.sleep(seconds)
        try:
            async with turn(places, 0.05):
                raise ValueError
        except ValueError:
            await asyncio.sleep(0.1)
        async with turn(places, 5.0):
            assert places.locked()

    asyncio.run(scene())
