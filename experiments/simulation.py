"""A federation in one process: every device in turn on one engine, real payloads, the coordinator's own arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coordinator import exactness, ingest, publish
from coordinator.rules import Rules
from coordinator.stores.memory import MemoryBlobs
from edge_client import starts
from edge_client.adapters import Adapter
from edge_client.banks import fitting, initial_of, layout_of
from edge_client.choosing import chosen
from edge_client.engines import Tokens
from edge_client.methods import Draw, Method, Trained, batches
from edge_client.participate import encoded
from edge_client.selection import selected
from edge_client.session import batch_seed, fitting_method, settled, view_of
from edge_client.starts import Source
from edge_client.view import View
from wire import spec
from wire.codecs import State
from wire.delta import Layout, Vector
from wire.messages import Contribution, Metrics, ReleaseManifest
from wire.run_spec import RunSpec
from wire.scalars import Directions, Step, Trajectory


@dataclasses.dataclass(frozen=True)
class Spent:
    """What rounds have cost, over all devices: forwards of one batch, processor seconds of training, payload bytes up,
    bytes of releases down, and tokens learned from."""

    forwards: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    tokens: int = 0

    def __add__(self, more: Spent) -> Spent:
        one, other = dataclasses.astuple(self), dataclasses.astuple(more)
        return Spent(*(a + b for a, b in zip(one, other, strict=True)))


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """What one device sent in a round, and what that has cost."""

    device: str
    payload: bytes
    examples: int
    spent: Spent


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """A release, and the stored bytes that a device needs to go on from it."""

    release: ReleaseManifest
    blobs: tuple[bytes, ...]


class Simulation:
    """One run. `devices` hold tokenized text; all of them take part in every round. `ranks` are of devices that tune less than
    the run's, where it lets them choose: an engine for each rank, over one base in memory. With a `start` it begins at another
    run's release."""

    def __init__(
        self,
        wanted: RunSpec,
        base: Any,
        engine_class: Any,
        threads: int,
        max_memory: int | None,
        ranks: Mapping[str, int] | None = None,
        start: Source | None = None,
    ) -> None:
        self.run, self.adapter_row = settled(dataclasses.replace(wanted, base=_named(wanted, base)), base)
        self.layout: Layout = layout_of(self.run, self.adapter_row, base)
        self.method: Method = fitting_method(self.run, engine_class)
        self._load = functools.partial(_loaded, engine_class, base, max_memory, threads)
        self._base, self._ranks, self._engines = base, ranks or {}, dict[int | None, Any]()
        self._views: dict[str, View] = {}
        self._own: dict[str, Vector] = {}
        self._first_losses: dict[str, float] = {}
        self._learned: dict[str, list[Tokens]] = {}
        self.engine = self.engine_of("")
        self._blobs = MemoryBlobs()
        self._codec_states: dict[str, State] = {}
        first = self.initial
        if start is not None:
            first, _ = starts.begun(start, self.adapter_row, base, self.layout, self.run.seed)
            self.run = dataclasses.replace(self.run, start=spec.bytes_digest(publish.as_bytes(first)))
        self.rules = Rules.of(self.run, self.layout)
        self.release = publish.initial(self.run, self.layout, self._blobs.put(publish.as_bytes(first)))
        self._state = Trajectory.start(self.run.directions or Directions(), self.layout, first)

    @property
    def initial(self) -> Vector:
        """What computes as the base, float32 [layout.size]."""
        return initial_of(self.run, self.adapter_row, self._base)

    @property
    def found(self) -> Source:
        """The newest release, for another run to start from."""
        return starts.of_release(self.run.name, self.adapter_row, self._base, self.adapter)

    @property
    def adapter(self) -> Vector:
        """The newest release's adapter, float32 [layout.size]."""
        return self._state.adapter

    def view_of(self, device: str) -> View:
        """What `device` sees of the run's adapter."""
        if device not in self._views:
            self._views[device] = view_of(self.run, self.adapter_row, self._base, self._ranks.get(device))
        return self._views[device]

    def engine_of(self, device: str) -> Any:
        """The engine of `device`, and of all of its rank."""
        view = self.view_of(device)
        if view.rank not in self._engines:
            self._engines[view.rank] = self._load(self._row(view), view.layout)
        return self._engines[view.rank]

    def adapter_of(self, device: str) -> Vector:
        """What `device` computes with: the newest release as it sees it, and what is its own; for `engine_of(device)`."""
        return self._start(device).adapter

    def _row(self, view: View) -> Adapter:
        return self.adapter_row if view.rank is None else self.adapter_row.narrowed(view.rank)

    def _start(self, device: str) -> Trajectory:
        view = self.view_of(device)
        if device not in self._own:
            first = self._row(view).initial(view.layout, self.run.seed, self._base)
            self._own[device] = view.own(first)
        return view.enter(self._state, self._own[device])

    def round(self, devices: Mapping[str, Sequence[Tokens]]) -> Spent:
        """Every device trains from the newest release; their updates make the next one.

        Raises PayloadError for an update that a coordinator would refuse, such as one of training that diverged."""
        sent = [self.sent(device, train) for device, train in devices.items()]
        self.publish(sent)
        return sum((one.spent for one in sent), Spent())

    def sent(self, device: str, train: Sequence[Tokens]) -> Sent:
        """What a device sends that trains from the newest release."""
        began = time.process_time()
        train = self._selected(device, train)
        payload, trained = self._payload(device, train)
        spent = Spent(trained.forwards, time.process_time() - began, len(payload), self._fetched, trained.tokens)
        return Sent(device, payload, len(train), spent)

    def publish(self, sent: Iterable[Sent]) -> Published:
        """The next release, of what the devices sent. Raises PayloadError for an update that a coordinator would refuse."""
        accepted = [self._contribution(one.device, one.payload, one.examples) for one in sent]
        made = publish.combine(self.rules, self.release, accepted, self._blobs)
        for contribution in accepted:
            self._blobs.delete(contribution.digest)  # nobody asks for it again, and memory is measured
        for blob in made.blobs:
            self._blobs.put(blob)
        needed = made.release.step, made.release.delta, made.release.adapter
        published = Published(made.release, tuple(bytes(self._blobs.get(d)) for d in needed if d is not None))
        self.follow(published)
        return published

    def aggregation_error(self, sent: Iterable[Sent]) -> float | None:
        """How far the aggregate of what the devices sent is from the mean of what their models do, relative to what that
        changes; None where there are no products of factors. Asked for before `publish`."""
        accepted = [self._contribution(one.device, one.payload, one.examples) for one in sent]
        return exactness.aggregation_error(self.rules, self.release, accepted, self._blobs)

    def follow(self, published: Published) -> None:
        """Go on from a release that was made here or in another process with the same run."""
        for blob in published.blobs:
            self._blobs.put(blob)
        self.release = published.release
        if self.release.step is not None:
            step = Step.parse(self._blobs.get(self.release.step), self._state.directions)
            self._state = self._state.after(step)
        else:
            adapter = publish.vector(self._blobs.get(self.release.adapter or ""), self.layout.size)
            self._state = Trajectory.start(self._state.directions, self.layout, adapter, self.release.version)

    def payload_of(self, device: str, train: Sequence[Tokens]) -> bytes:
        """What `device` would send now."""
        return self._payload(device, self._selected(device, train))[0]

    def _selected(self, device: str, train: Sequence[Tokens]) -> Sequence[Tokens]:
        """What a device learns of its text, chosen once."""
        if self.run.selection is None:
            return train
        if device not in self._learned:
            view = self.view_of(device)
            first = self._row(view).initial(view.layout, self.run.seed, self._base)
            self._learned[device] = selected(self.engine_of(device), first, train, self.run.selection)
        return self._learned[device]

    def _payload(self, device: str, train: Sequence[Tokens]) -> tuple[bytes, Trained]:
        number = self.release.version + 1
        engine, seed = self.engine_of(device), batch_seed(self.run, device, number)
        first = next(batches(train, 1, self.method.batch, seed))
        if self.view_of(device).bank is not None:
            self._views[device] = fitting(self.view_of(device), f"{self.run.seed}/{device}", engine, self._state, first)
        view, start = self.view_of(device), self._start(device)
        portion = chosen(view, view.portion(number, device), engine, start.adapter, first)
        fallen = 0.0 if view.rule is None or view.rule.density is None else self._fallen(device, start.adapter, train)
        key = start.directions.key(self.run.seed, number, device)
        draw = Draw(seed, key, (number - 1) / self.run.rounds, view.tuned(portion))
        trained = self.method.train(engine, start, train, draw)
        kept, codec = self._codec_states.get(device), self.rules.codec
        encoder = codec and self.run.encoder(codec, number)
        payload, self._codec_states[device] = encoded(trained.update, view, portion, encoder, kept, fallen)
        self._own[device] = view.own(trained.adapter)
        return payload, trained

    def _fallen(self, device: str, adapter: Vector, train: Sequence[Tokens]) -> float:
        """How far the loss of a device's text has fallen since its first round, in nats: of some of what it trains on, for
        nothing is held out here."""
        engine = self.engine_of(device)
        engine.write(adapter)
        total, targets = engine.loss(train[: self.run.evaluation.max_sequences])
        loss = float(total / targets)
        return self._first_losses.setdefault(device, loss) - loss

    @property
    def _fetched(self) -> int:
        """What a device that holds the release before fetches of this one: of coded releases and steps, what was added."""
        release, whole = self.release, self.rules.snapshot_bytes
        if release.version == 0 and self.rules.leads(0, 0):
            return 0
        added = release.step or release.delta
        return whole if added is None else min(whole, self._blobs.size(added))

    def _contribution(self, device: str, payload: bytes, examples: int) -> Contribution:
        number, digest = self.release.version + 1, self._blobs.put(payload)
        named = (self.run.base.digest, self.release.digest)
        mine = Contribution(device, self.run.name, number, 1, digest, len(payload), examples, *named, Metrics())
        ingest.examine(mine, payload, self.rules)
        return mine


def _loaded(engine_class: Any, base: Any, max_memory: int | None, threads: int, row: Adapter, layout: Layout) -> Any:
    return engine_class.load(base, row, layout, max_memory, threads=threads)


def _named(wanted: RunSpec, base: Any) -> Any:
    return dataclasses.replace(wanted.base, digest=base.identity)


def spec_of(name: str, method: spec.Plain, rounds: int, devices: int, base: spec.Plain, seed: int) -> spec.Plain:
    """A run's table for `devices` that all take part."""
    return {
        "name": name, "base": base, "rounds": rounds, "cohort": {"goal": devices}, "method": method, "seed": seed,
    }  # fmt: skip
