"""What a run's spec says of its updates and of combining them, built once: which forms it admits, and how much each counts."""

from __future__ import annotations

import dataclasses

import numpy as np

from coordinator.aggregators import AGGREGATORS, SERVER_OPTIMIZERS, Aggregator, ServerOptimizer, Sum
from wire import portion_rules, portions, scalars, spec, split
from wire.banks import banks
from wire.codecs import trial
from wire.codecs.chain import LONGEST_TARGET, Chain
from wire.delta import HISTORY, Delta, Layout, Vector
from wire.errors import PayloadError, Reason, SpecError
from wire.portion_rules import Rule, rule_of
from wire.portions import Part
from wire.run_spec import RunSpec, check_mode
from wire.scalars import Directions, Scalars, Step, Trajectory
from wire.split import Split

Update = Delta | Scalars | Split | Part
"""The forms of an update, by who made it: with gradients, without, with gradients for some layers, or of a part of the layout."""


PLAIN_STEP: spec.Plain = {"id": "average", "learning_rate": 1.0}
"""The server optimizer that adds the aggregate as it is."""
MOST_HELD = 4 << 30
"""Bytes of the updates of a round where an aggregator needs them all at once; its process would otherwise be killed, and
each that took over."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a run's spec says of combining, built once. `codec` is None for a run that admits scalars alone, `downlink` for one
    whose releases travel as whole adapters or as steps."""

    spec: RunSpec
    layout: Layout
    codec: Chain | None
    aggregator: Aggregator
    optimizer: ServerOptimizer
    downlink: Chain | None = None
    portions: Rule | None = None

    @classmethod
    def of(cls, run: RunSpec, layout: Layout) -> Rules:
        """Raises SpecError for a row that is not in its table, or rows that do not go together."""
        aggregator = spec.build(AGGREGATORS, run.aggregator, "aggregator")
        optimizer = spec.build(SERVER_OPTIMIZERS, run.server_optimizer, "server_optimizer")
        downlink = run.downlink.chain() if run.downlink else None
        made = cls(run, layout, run.chain(), aggregator, optimizer, downlink, rule_of(run))
        check_mode(run)
        if aggregator.individual:
            _check_individual(made)
        if run.rates:
            _check_rates(made)
        if made.portions and made.directions:
            raise SpecError(
                "portions: scalars along directions are of the whole layout; a run of portions takes deltas alone"
            )
        if made.portions is None and any(tensor.role in HISTORY for tensor in layout.tensors):
            raise SpecError('portions: a layout with history needs them, at least [portions] id = "tuned"')
        if (made.portions.names if made.portions else ()) != tuple(banks(layout)):
            raise SpecError('portions: the layout has other banks than [portions] id = "bank" names')
        if made.portions:
            portion_rules.check_layout(made.portions, layout)
        if made.codec is None and made.downlink:
            raise SpecError("downlink: the releases of a run of scalars alone are steps, shorter than any coded delta")
        if made.codec is None and spec.plain(optimizer) != PLAIN_STEP:
            raise SpecError("server_optimizer: a run of scalars alone needs average with a learning_rate of 1")
        if made.codec and made.directions and (made.directions.drawn == "pool" or made.directions.curvature):
            raise SpecError(
                "a run that takes deltas too needs scalars with neither pool nor curvature: not kseed or hiso"
            )
        return made

    @property
    def directions(self) -> Directions | None:
        return self.spec.directions

    def max_bytes(self) -> int:
        """The longest payload of any form."""
        if self.codec and self.directions:
            return split.max_bytes(self.codec, self.directions, self.layout)
        if self.codec and self.portions:
            return portions.max_bytes(self.codec, self.layout)
        return self.codec.max_bytes(self.layout) if self.codec else self.along().max_bytes()

    @property
    def snapshot_bytes(self) -> int:
        """The length of a release that is sent whole: the adapter, and what else there is to walk on from it."""
        return (8 if self.directions and self.directions.curvature else 4) * self.layout.size

    def leads(self, held: int, version: int) -> bool:
        """Whether a device that holds release `held` can be given what was added since instead of release `version` whole."""
        if self.spec.downlink is not None:
            return 0 <= version - held <= self.spec.downlink.longest_chain
        return self.codec is None and held <= version

    def along(self) -> Directions:
        """The directions of a run that admits scalars."""
        assert self.directions is not None, "who asks has seen scalars, or a run without a codec"
        return self.directions

    def read(self, payload: bytes | memoryview) -> Update:
        """A payload of a form that this run admits. Total: raises PayloadError for everything else."""
        if split.is_split(payload) and self.codec and self.directions:
            return split.decode(payload, self.codec, self.directions, self.layout)
        if scalars.is_scalars(payload):
            if self.directions is None:
                raise PayloadError(Reason.WRONG_CODEC, "this run admits no updates in scalars")
            return scalars.decode(payload, self.directions, self.layout)
        if self.codec is None:
            raise PayloadError(Reason.WRONG_CODEC, "this run admits updates in scalars alone")
        if self.portions is not None:
            return portions.decode(payload, self.codec, self.layout)
        return self.codec.decode(payload, self.layout)

    def added(self, payload: memoryview, weight: int, total: Sum) -> bool:
        """Add a delta without a whole vector in between. False, and nothing added, for other forms and where its codec cannot."""
        if self.codec is None or self.portions or split.is_split(payload) or scalars.is_scalars(payload):
            return False
        return total.add_coded(self.codec, payload, self.layout, weight)

    def check(self, update: Update, number: int, device: str) -> None:
        """Raises PayloadError for a part that is not the one that `device` was to send in round `number`, and for entries that
        could not be added."""
        if isinstance(update, Part):
            assert self.portions is not None, "a part is read in a run with portions alone"
            portion_rules.check(self.portions, update.portion, self.layout, number, device)
        self.aggregator.check(self.vector(update, number, device))

    def vector(self, update: Update, number: int, device: str) -> Vector:
        """What an update adds to the adapter, float32 [layout.size]: a delta as it is, scalars replayed along the directions
        that `device` was given in round `number`."""
        if isinstance(update, Delta | Part):
            return update.vector
        key = self.along().key(self.spec.seed, number, device)
        if isinstance(update, Split):
            return update.vector(key, number - 1)
        zero = np.zeros(self.layout.size, np.float32)
        start = Trajectory.start(update.directions, self.layout, zero, number - 1)
        return start.delta(Step(((key, update.units),)))

    def noise(self, update: Update) -> float:
        """The variance of an update's direction relative to the gradient's square: (d - 1) / M for M scalars in d
        dimensions, 0 for a delta, whose sampling noise all devices share. A split update has that of its scalars, by their
        share of the entries: as if each entry had the same part of the gradient."""
        if isinstance(update, Delta | Part):
            return 0.0
        if isinstance(update, Split):
            lower = update.layout.below(update.below).size
            return (lower - 1) / update.scalars.directions.count * lower / self.layout.size
        return (self.layout.size - 1) / update.directions.count


def _check_rates(by: Rules) -> None:
    """Raises SpecError where no codec of the run has a target to spread."""
    codecs = [codec for codec in (by.codec, by.downlink) if codec is not None]
    if all(codec.rated(share) is codec for codec in codecs for share in (0.5, 2.0)):  # at a bound it goes one way alone
        raise SpecError("rates: neither updates nor releases have a codec with a target of bits, such as rotated_ecsq")


def check_codecs(run: RunSpec) -> None:
    """Try the codecs of a run that is created, at the rates of its first and last round: a tenth of a second, at most one.

    Raises SpecError for stages that do not go together, and for rates beyond what a codec can be asked for. A stored run is not
    looked at so: it was.
    """
    codecs = {"codec": run.chain(), "downlink.codec": run.downlink.chain() if run.downlink else None}
    for where, codec in ((where, codec) for where, codec in codecs.items() if codec is not None):
        for number in {1, run.rounds}:
            share = 1.0 if run.rates is None else run.rates.share(number, run.rounds)
            _check_most(codec, share, number, where)
            trial.check(codec, share, where)


def _check_most(codec: Chain, share: float, number: int, where: str) -> None:
    if codec.target_bits * share > LONGEST_TARGET * (1 + 1e-9):
        raise SpecError(
            f"rates: with this growth {where} has {share:.3g} times {codec.target_bits:g} bits a parameter in round {number}, "
            f"and {LONGEST_TARGET:g} are the most: take a smaller target_bits, or a growth nearer to 1"
        )


def _check_individual(made: Rules) -> None:
    """Raises SpecError for a run whose aggregator multiplies each device's factors, and cannot."""
    run = made.spec
    name, held = run.aggregator["id"], run.cohort.size * 4 * made.layout.size
    if made.codec is None:
        raise SpecError(f"aggregator: {name} takes deltas; a run of scalars alone has none")
    if run.cohort.mode == "async":
        raise SpecError(f"aggregator: {name} multiplies factors of one release; a buffer's updates start from several")
    if spec.plain(made.optimizer) != PLAIN_STEP:
        raise SpecError(f"server_optimizer: {name} makes the whole step itself: average with a learning_rate of 1")
    if held > MOST_HELD:
        raise SpecError(
            f"aggregator: {name} holds every update of a round: {held / 2**30:.1f} GiB, more than {MOST_HELD >> 30}"
        )
    made.aggregator.check_layout(made.layout, made.portions)
