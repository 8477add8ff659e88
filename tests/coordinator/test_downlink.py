"""Releases as coded deltas: both ends hold the same adapter bit for bit, a late device gets the cheaper of two ways there."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from coordinator import publish
from coordinator.rules import Rules
from coordinator.stores import Store
from coordinator.stores.memory import MemoryBlobs
from coordinator.stores.sqlite import SqliteLedger
from coordinator.verify import Checked, verify
from edge_client.releases import Releases
from edge_client.transport import Connection, Fetched
from tests.conformance import test_stores as stores
from tests.coordinator.test_publish import contribution
from tests.updates import LAYOUT, make, named
from wire import spec
from wire.codecs.chain import HEADER_BYTES
from wire.codecs.compositions import BALANCE, COMPOSITIONS, ROTATION, ecsq, ectcq
from wire.delta import Delta, Layout, Vector
from wire.errors import PayloadError, SpecError
from wire.messages import ReleaseManifest, Task
from wire.run_spec import RunSpec
from wire.scalars import Scalars
from wire.spec import Plain

OPTIMIZERS: list[dict[str, Any]] = [{"id": "average"}, {"id": "momentum"}, {"id": "adam", "epsilon": 0.1}]
BEFORE: dict[str, list[Plain]] = {"": [], "rotated_": [ROTATION], "balanced_": [BALANCE, ROTATION]}
CODECS = {name: name for name in COMPOSITIONS} | {
    f"{kind}{last.__name__}": last(2.0, *before) for kind, before in BEFORE.items() for last in (ecsq, ectcq)
}
"""At their own rate these six have no room in an adapter of a thousand entries."""
ZERO = np.zeros(LAYOUT.size, np.float32)


def mean_of_round(number: int, layout: Layout = LAYOUT) -> Vector:
    """What round `number` learns, in multiples of 2^-24: a part that stays and a part that does not, from integers alone."""
    at = np.arange(layout.size, dtype=np.int64)
    fixed, passing = (at * 7919) % 997, (at * 104729 + number * 1299709) % 1009
    return ((40 * (fixed - 498) + 160 * (passing - 504)) * 2.0**-24).astype(np.float32)


def payload_of(by: Rules, vector: Vector) -> bytes:
    assert by.codec is not None
    return by.codec.encode(Delta(by.layout, vector), by.codec.init(by.layout))[0]


def published(by: Rules, rounds: int, blobs: MemoryBlobs) -> list[ReleaseManifest]:
    """Releases 0 to `rounds`, each of one lossless update."""
    releases = [publish.initial(by.spec, by.layout, blobs.put(bytes(4 * by.layout.size)))]
    for number in range(1, rounds + 1):
        payload = payload_of(by, mean_of_round(number))
        blobs.put(payload)
        accepted = dataclasses.replace(contribution("d1", number, 0, payload), staleness=None)
        made = publish.combine(by, releases[-1], [accepted], blobs)
        assert {blobs.put(blob) for blob in made.blobs} == set(made.release.blobs)
        releases.append(made.release)
    return releases


def rules(**changes: Any) -> Rules:
    return Rules.of(make("coded", **{"rounds": 40, "downlink": {"codec": "top_k_int4_5"}} | changes), LAYOUT)


def stored(blobs: MemoryBlobs, digest: str | None) -> Vector:
    return publish.vector(blobs.get(digest or ""), LAYOUT.size)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[row["id"] for row in OPTIMIZERS])
def test_adapter_and_residual_together_walk_as_they_would_uncoded(codec: str, optimizer: dict[str, Any]) -> None:
    coded = rules(downlink={"codec": CODECS[codec]}, server_optimizer=optimizer)
    plain, blobs = rules(downlink=None, server_optimizer=optimizer), MemoryBlobs()
    last, wanted = published(coded, 40, blobs)[-1], published(plain, 40, blobs)[-1]
    assert last.optimizer_state == wanted.optimizer_state, "the optimizer never sees what the codec loses"
    adapter, residual, exact = stored(blobs, last.adapter), stored(blobs, last.residual), stored(blobs, wanted.adapter)
    np.testing.assert_allclose(adapter + residual, exact, atol=1e-6 + 1e-6 * np.abs(exact).max())
    assert np.abs(residual).max() < 0.5 * np.abs(exact).max()
    assert (codec == "float32") == (not residual.any())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[row["id"] for row in OPTIMIZERS])
def test_without_a_downlink_a_release_is_the_adapter_plus_the_step(optimizer: dict[str, Any]) -> None:
    by, blobs = rules(downlink=None, server_optimizer=optimizer), MemoryBlobs()
    adapter, state = ZERO, np.zeros(by.optimizer.state_size(LAYOUT.size), np.float32)
    for number, release in enumerate(published(by, 3, blobs)[1:], 1):
        step, state = by.optimizer.step(mean_of_round(number), state)
        adapter = adapter + step
        assert stored(blobs, release.adapter).tobytes() == adapter.tobytes()
        assert (release.delta, release.residual, release.trail) == (None, None, None)


def test_a_decay_forgets_what_was_not_sent() -> None:
    owed = []
    for decay in (0.0, 0.5, 1.0):
        blobs = MemoryBlobs()
        releases = published(rules(downlink={"codec": "top_k_int4_5", "decay": decay}), 20, blobs)
        owed.append(float(np.abs(stored(blobs, releases[-1].residual)).sum()))
    assert owed[0] < owed[1] < owed[2]


def test_with_rates_the_last_release_leaves_less_unsent_for_no_more_bits_in_all() -> None:
    def left(**rates: Any) -> tuple[float, int]:
        blobs = MemoryBlobs()
        last = published(rules(rounds=12, downlink={"codec": ecsq(2.0)}, **rates), 12, blobs)
        sizes = [blobs.size(release.delta) for release in last if release.delta]
        return float(np.square(stored(blobs, last[-1].residual)).sum()), sum(sizes)

    (even, bits), (rising, as_many) = left(), left(rates={"growth": 3.0})
    assert rising < 0.25 * even and as_many <= bits


def test_rates_need_a_codec_with_a_target() -> None:
    with pytest.raises(SpecError, match="target of bits"):
        rules(rates={"growth": 4.0})
    for target in (0.001, 12.0):  # from a bound it can go one way alone, and has a target all the same
        rules(codec=ecsq(target), rates={"growth": 4.0})


def test_a_coded_release_is_golden_for_ever() -> None:
    last = published(rules(rounds=3, server_optimizer={"id": "momentum"}), 3, MemoryBlobs())[-1]
    assert [digest[:12] for digest in last.blobs] == GOLDEN_BLOBS
    assert (last.digest[:16], (last.trail or "")[:16]) == GOLDEN_NAMES


GOLDEN_BLOBS = ["96428f1fec31", "d4c24127fc42", "a1e36807668b", "77713df522aa", "6522562db142"]
GOLDEN_NAMES = ("05e954e752fb31b5", "eef3280c0985062a")


def test_a_run_that_takes_scalars_beside_deltas_codes_what_both_make() -> None:
    by, blobs = rules(directions={"drawn": "device", "count": 8}), MemoryBlobs()
    assert by.directions is not None
    some = Scalars.of(by.directions, np.full(8, 1e-3)).encode(LAYOUT)
    accepted = []
    for device, payload in {"gradients": payload_of(by, mean_of_round(1)), "losses": some}.items():
        blobs.put(payload)
        accepted.append(dataclasses.replace(contribution(device, 1, 0, payload), staleness=None))
    first = publish.initial(by.spec, LAYOUT, blobs.put(bytes(4 * LAYOUT.size)))
    coded, plain = (
        publish.combine(one, first, accepted, blobs) for one in (by, dataclasses.replace(by, downlink=None))
    )
    for blob in (*coded.blobs, *plain.blobs):
        blobs.put(blob)
    together = stored(blobs, coded.release.adapter) + stored(blobs, coded.release.residual)
    np.testing.assert_allclose(together, stored(blobs, plain.release.adapter), atol=1e-7)
    assert np.abs(together).max() > 1e-3


def test_a_run_of_scalars_alone_takes_no_downlink() -> None:
    with pytest.raises(SpecError, match="downlink"):
        rules(codec=None, directions={"count": 4})


@pytest.mark.parametrize(
    ("downlink", "said"),
    [
        ({"codec": "int2"}, "downlink.codec: unknown name 'int2'"),
        ({"codec": "int4", "longest_chain": 17}, "longest_chain must lie between 1 and 16"),
        ({"codec": "int4", "longest_chain": 0}, "longest_chain must lie between 1 and 16"),
        ({"codec": "int4", "decay": 1.5}, "decay"),
        ({}, "missing key 'codec'"),
    ],
)
def test_a_downlink_that_cannot_be_is_refused_by_what_is_wrong_with_it(downlink: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make("wrong", downlink=downlink)


# From here on a real coordinator answers.


def started(connection: Connection, name: str, **changes: Any) -> RunSpec:
    run = make(name, **{"rounds": 40, "downlink": {"codec": "top_k_int4_5"}} | changes)
    connection.create_run(run, LAYOUT, ZERO)
    return run


def play(connection: Connection, run: RunSpec, rounds: int) -> None:
    """So many more rounds, of one update each."""
    by = Rules.of(run, LAYOUT)
    for _ in range(rounds):
        task = connection.check_in("d1", (run.name,), 20.0)
        assert isinstance(task, Task) and task.kind == "train"
        payload = payload_of(by, mean_of_round(task.round))
        connection.send(named(task, payload), payload)
    assert isinstance(connection.check_in("d1", (run.name,), 20.0), Task)


def whole(connection: Connection, run: RunSpec, version: int | None = None) -> Fetched:
    return connection.release(run.name, 4 * LAYOUT.size, version)


@pytest.mark.parametrize(
    ("codec", "optimizer"),
    [("int4", OPTIMIZERS[0]), ("top_k_int4_5", OPTIMIZERS[1]), ("float16", OPTIMIZERS[2])],
    ids=["int4", "top_k", "float16"],
)
def test_over_forty_releases_every_device_holds_the_coordinators_bits_by_the_cheaper_way(
    connection: Connection, codec: str, optimizer: dict[str, Any]
) -> None:
    run = started(connection, f"forty-{codec}".replace("_", "-"), downlink={"codec": codec}, server_optimizer=optimizer)
    devices = {gap: Releases() for gap in (1, 2, 5, 16, 17)}
    sizes: list[int] = []
    for version in range(1, 41):
        play(connection, run, 1)
        sizes.append(len(connection.release(run.name, 4 * LAYOUT.size, version, version - 1).data))
        adapter = whole(connection, run).data
        for gap, device in devices.items():
            if version % gap == 0:
                held = device.fetch(connection, run, LAYOUT, ZERO, version)
                assert held.trajectory.adapter.tobytes() == adapter
                chain = sum(sizes[-gap:]) if gap <= 16 else 4 * LAYOUT.size
                assert held.bytes == min(chain, 4 * LAYOUT.size)
    again = devices[1].fetch(connection, run, LAYOUT, ZERO)
    assert again.bytes == 0 and again.trajectory.adapter.tobytes() == adapter
    earlier = devices[1].fetch(connection, run, LAYOUT, ZERO, 12)
    assert earlier.trajectory.adapter.tobytes() == whole(connection, run, 12).data


class Hostile:
    """A coordinator whose first answers `change`; `asked` are the versions that the device said it held."""

    def __init__(self, connection: Connection, calls: int, change: Callable[[Fetched], Fetched]) -> None:
        self._connection, self._left, self._change = connection, calls, change
        self.asked: list[int | None] = []

    def release(self, run: str, limit: int, version: int | None, after: int | None = None) -> Fetched:
        self.asked.append(after)
        fetched = self._connection.release(run, limit, version, after)
        self._left -= 1
        return fetched if self._left < 0 else self._change(fetched)


def flipped(fetched: Fetched) -> Fetched:
    data = bytearray(fetched.data)
    data[-1] ^= 1
    return dataclasses.replace(fetched, data=memoryview(data))


def test_a_damaged_delta_is_not_decoded_and_the_adapter_is_fetched_instead(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(connection, "damaged")
    play(connection, run, 3)
    hostile = Hostile(connection, 1, flipped)
    with monkeypatch.context() as patch:
        patch.setattr("wire.codecs.chain.Chain.decode", lambda *_: pytest.fail("decoded before its digest was checked"))
        held = Releases().fetch(hostile, run, LAYOUT, ZERO)  # type: ignore[arg-type]
    assert hostile.asked == [0, None]
    assert held.trajectory.adapter.tobytes() == whole(connection, run).data
    assert held.bytes > 4 * LAYOUT.size, "both answers were paid for"


def test_a_damaged_adapter_is_an_error(connection: Connection) -> None:
    run = started(connection, "damaged-twice")
    play(connection, run, 2)
    with pytest.raises(PayloadError):
        Releases().fetch(Hostile(connection, 2, flipped), run, LAYOUT, ZERO)  # type: ignore[arg-type]


def test_a_device_that_starts_from_another_release_gets_the_adapter(connection: Connection) -> None:
    run = started(connection, "elsewhere")
    play(connection, run, 2)
    held = Releases().fetch(connection, run, LAYOUT, ZERO + np.float32(1e-3))
    assert held.trajectory.adapter.tobytes() == whole(connection, run).data


def test_a_chain_longer_than_the_run_allows_is_not_walked(connection: Connection) -> None:
    run = started(connection, "short", downlink={"codec": "top_k_int4_5", "longest_chain": 2})
    play(connection, run, 3)
    assert connection.release(run.name, 4 * LAYOUT.size, 3, 0).sizes == ()
    assert len(connection.release(run.name, 4 * LAYOUT.size, 3, 1).sizes) == 2
    links = [connection.release(run.name, 4 * LAYOUT.size, v, v - 1).data for v in (1, 2, 3)]

    def stretched(fetched: Fetched) -> Fetched:
        return Fetched(fetched.release, memoryview(b"".join(links)), tuple(map(len, links)))

    hostile = Hostile(connection, 1, stretched)
    held = Releases().fetch(hostile, run, LAYOUT, ZERO)  # type: ignore[arg-type]
    assert hostile.asked == [0, None] and held.trajectory.adapter.tobytes() == whole(connection, run).data


class Shelf:
    """A device's folder, in memory."""

    def __init__(self) -> None:
        self.on_it: tuple[ReleaseManifest, Vector] | None = None

    def keep(self, release: ReleaseManifest, adapter: Vector) -> None:
        self.on_it = release, adapter.copy()

    def kept(self, run: str) -> tuple[ReleaseManifest, Vector] | None:
        return self.on_it


def test_a_client_that_starts_anew_needs_only_what_was_added(connection: Connection) -> None:
    run, shelf = started(connection, "anew"), Shelf()
    play(connection, run, 2)
    Releases(shelf=shelf).fetch(connection, run, LAYOUT, ZERO)
    play(connection, run, 1)
    added = len(connection.release(run.name, 4 * LAYOUT.size, 3, 2).data)
    held = Releases(shelf=shelf).fetch(connection, run, LAYOUT, ZERO)
    assert held.bytes == added and held.trajectory.adapter.tobytes() == whole(connection, run).data
    assert shelf.on_it is not None and shelf.on_it[0] == held.release


def test_a_kept_release_of_another_run_or_with_another_adapter_is_not_started_from(connection: Connection) -> None:
    run, other = started(connection, "this-run"), started(connection, "that-run")
    play(connection, run, 2)
    play(connection, other, 2)
    foreign, damaged = Shelf(), Shelf()
    Releases(shelf=foreign).fetch(connection, other, LAYOUT, ZERO)
    held = Releases(shelf=damaged).fetch(connection, run, LAYOUT, ZERO)
    damaged.keep(held.release, held.trajectory.adapter + np.float32(1e-3))
    for shelf in (foreign, damaged):
        again = Releases(shelf=shelf).fetch(connection, run, LAYOUT, ZERO)
        assert again.bytes == held.bytes and again.trajectory.adapter.tobytes() == whole(connection, run).data


def rewritten(payload: bytes) -> bytes:
    """The same bytes as `payload`, which ends in a zstd stage, not compressed where they were and compressed where not."""
    head, body = payload[:HEADER_BYTES], payload[HEADER_BYTES:]
    if body[0]:
        return head + b"\0" + zstandard.decompress(body[1:])
    return head + b"\1" + zstandard.compress(body[1:])


@pytest.mark.parametrize(
    ("how", "said"), [("same", None), ("rewritten", None), ("nearly", None), ("other", "sends less of the sum")]
)
def test_verify_takes_another_delta_only_if_it_sends_as_much(how: str, said: str | None, tmp_path: Path) -> None:
    layout = stores.LAYOUT

    async def check() -> tuple[Checked, Checked]:
        store = Store(SqliteLedger(tmp_path), MemoryBlobs())
        run = stores.spec(cohort={"goal": 1}, downlink={"codec": "int4"})
        by = Rules.of(run, layout)
        first = publish.initial(run, layout, store.blobs.put(bytes(4 * layout.size)))
        await store.ledger.create_run(run, layout, first)
        learned = np.linspace(-1, 1, layout.size, dtype=np.float32)
        payload = payload_of(by, learned)
        task, digest = await stores.task_of(store.ledger, "d1"), store.blobs.put(payload)
        mine = stores.contribution(task, "d1", digest, size=len(payload))
        await store.ledger.accept(mine)
        [(_, sealed)] = await store.ledger.sealed()
        honest = publish.combine(by, first, [mine], store.blobs)
        [delta] = [bytes(blob) for blob in honest.blobs if spec.bytes_digest(blob) == honest.release.delta]
        other = dataclasses.replace(by, codec=by.downlink)
        deltas = {
            "same": delta,
            "rewritten": rewritten(delta),
            "nearly": payload_of(other, np.float32(1.001) * learned),
            "other": payload_of(other, np.full(layout.size, 0.1, np.float32)),
        }
        made = publish.combine(by, first, [mine], store.blobs, deltas[how])
        for blob in made.blobs:
            store.blobs.put(blob)
        assert await store.ledger.publish(run.name, sealed, made.release)
        assert (made.release == honest.release) == (how == "same")
        assert set(made.release.blobs) < await store.ledger.named_blobs(), "what gc spares"
        whole = (await verify(store, run.name))[1]
        store.blobs.delete(made.release.residual or "")
        damaged = (await verify(store, run.name))[1]
        await store.ledger.close()
        return whole, damaged

    whole, damaged = asyncio.run(check())
    assert (whole.fault is None) == (said is None) and (said or "") in (whole.fault or "")
    assert whole.coded_here == (how == "same")
    assert damaged.fault is not None
