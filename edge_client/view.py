"""A device's view of a run's adapter: what it tunes of it in a round, at its own rank, and what beside it is its own.

The run's layout is what devices share. An engine holds the device's view: the shared tensors, as far as the device's rank goes,
and after them its personal ones, which never travel.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from wire.banks import banks, unmarked
from wire.codecs import State
from wire.codecs.chain import Chain
from wire.delta import RANK_AXES, Delta, Layout, Vector
from wire.portion_rules import Bank, Rule, tunable
from wire.portions import Part, Portion
from wire.scalars import Trajectory

REST = "rest"
"""The name, in a codec's state, of what a device tuned and could not send yet."""


@dataclasses.dataclass(frozen=True)
class View:
    """`shared` is the run's layout, `personal` the layout of what is the device's own; `rank` None where it is the run's; `bank`
    the places of the one adapter that it computes with, where a run has several."""

    shared: Layout
    rule: Rule | None = None
    rank: int | None = None
    personal: Layout | None = None
    bank: tuple[int, ...] | None = None

    def of(self, bank: tuple[int, ...]) -> View:
        """The same with another bank."""
        return dataclasses.replace(self, bank=bank)

    @property
    def bank_name(self) -> str | None:
        """Of the bank that it computes with."""
        return next((name for name, places in banks(self.shared).items() if places == self.bank), None)

    @functools.cached_property
    def layout(self) -> Layout:
        """The engine's."""
        shared = self.shared if self._narrow is None else self._narrow.layout(self.shared)
        shared = shared if self.bank is None else unmarked(shared)
        return shared if self.personal is None else Layout(shared.tensors + self.personal.tensors)

    @property
    def _narrow(self) -> Portion | None:
        every = tuple(range(len(self.shared.tensors)))
        return None if self.rank is None and self.bank is None else Portion(self.bank or every, self.rank)

    @property
    def own_size(self) -> int:
        """Entries of the personal tensors."""
        return 0 if self.personal is None else self.personal.size

    def enter(self, start: Trajectory, own: Vector) -> Trajectory:
        """What an engine starts from: a release as this device sees it, and `own`, float32 [own_size]."""
        if self.layout is self.shared:
            return start
        shared = start.adapter if self._narrow is None else self._narrow.take(start.adapter, self.shared)
        return Trajectory.start(start.directions, self.layout, np.concatenate([shared, own]), start.version)

    def own(self, adapter: Vector) -> Vector:
        """The personal entries of an engine's vector, float32 [own_size]."""
        return adapter[self.layout.size - self.own_size :]

    def portion(self, number: int, device: str) -> Portion | None:
        """What the device may send at the most in round `number`; None where a run has no portions."""
        if self.rule is None:
            return None
        most = self.rule.most(self.shared, number, device)
        chosen = self.rule.within(self.bank or (), self.shared) if isinstance(self.rule, Bank) else most.chosen
        ranks = [rank for rank in (most.rank, self.rank) if rank is not None]
        return Portion(chosen, min(ranks, default=None))

    @property
    def chooses(self) -> bool:
        """Whether the device says which layers it sends."""
        return self.rule is not None and self.rule.choose is not None

    def tuned(self, portion: Portion | None) -> tuple[int, ...] | None:
        """The engine's tensors that are tuned when `portion` is to be sent; None for all that can be."""
        if portion is None or self.rule is None or self.bank is not None:
            return None
        shared = tunable(self.shared) if self.rule.rest else portion.chosen
        return (*shared, *range(len(self.shared.tensors), len(self.layout.tensors)))

    def shared_delta(self, delta: Delta) -> Delta:
        """What a delta of the engine's layout changes in the run's."""
        if self.layout is self.shared:
            return delta
        changed = delta.vector[: self.layout.size - self.own_size]
        return Delta(self.shared, changed if self._narrow is None else self._narrow.put(changed, self.shared))


def send_part(
    delta: Delta, portion: Portion, rule: Rule, codec: Chain, kept: State | None, fallen: float = 0.0
) -> tuple[bytes, State]:
    """The payload of a portion of `delta`, and the state that its receipt will confirm; `fallen` is how far, in nats, this
    device's loss has.

    A codec has a memory for each portion, so that a segment meets its own again when its turn comes. With `rule.rest`, what is
    not sent is added to the next update, as error feedback does (arXiv 1901.09847).
    """
    held, layout = kept or {}, delta.layout
    carried = held.get(REST) if rule.rest else None
    owed = delta.vector if carried is None or len(carried) != layout.size else delta.vector + carried
    inner = portion.layout(layout)
    turn = portion.take(owed, layout)
    sent = turn if rule.density is None else rule.density.thinned(turn, inner, fallen)
    part = Part(layout, portion, Delta(inner, sent))
    mine = f"{inner.digest[:12]}/"
    payload, following = part.encode(codec, _of_portion(codec, inner, held, mine))
    state = {key: value for key, value in held.items() if "/" in key and not key.startswith(mine)}
    state = _fitting(state, layout.size) | {mine + key: value for key, value in following.items()}
    return payload, state | {REST: owed - portion.put(sent, layout)} if rule.rest else state


def _of_portion(codec: Chain, inner: Layout, held: State, mine: str) -> State:
    fresh = codec.init(inner)
    found = {key: held.get(mine + key, value) for key, value in fresh.items()}
    return found if all(found[key].shape == value.shape for key, value in fresh.items()) else fresh


def _fitting(state: State, size: int) -> State:
    """Nothing, where portions that are drawn anew each time would make a device remember without end."""
    return state if sum(value.size for value in state.values()) <= 2 * size else {}


def full_rank(layout: Layout) -> int:
    """The longest rank axis of a layout, 1 for one without."""
    return max((t.shape[axis] for t in layout.tensors for axis in RANK_AXES.get(t.role, ())), default=1)


def fitting_rank(rule: Rule | None, wanted: int | None, full: int) -> int | None:
    """A device's rank in a run of rank `full`: the one that is `wanted` within what the run lets it choose; None for all."""
    if rule is None or rule.least_rank is None or wanted is None or wanted >= full:
        return None
    return max(rule.least_rank, wanted)
