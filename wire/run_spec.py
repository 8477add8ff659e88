"""RunSpec: everything that describes a run, as data. Frozen when the run is created; its digest names the run's rules."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from wire import spec
from wire.codecs import chain
from wire.codecs.chain import Chain
from wire.errors import SpecError
from wire.scalars import Directions
from wire.spec import Plain

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
EDITION = 2
"""The newest edition of run specs that this program reads; a client says it when it asks for work. A field that a released
program does not know gets `metadata=spec.since(N)`, and a row is left out of `FIRST`."""
FIRST = frozenset(
    {"lora", "ferret", "mezo", "kseed", "decomfl", "hiso", "lora_sb", "norms", "adamw", "sgd"}
    | {"float32", "float16", "blockwise", "top_k", "rice", "error_feedback", "pack", "zstd"}
    | {"mean", "average", "momentum", "adam"}
)
"""The rows that programs of edition 1 have; all others are of the second."""


@dataclasses.dataclass(frozen=True)
class BaseRef:
    """The frozen base every device computes from: how to get it (`model`, `format`) and what it must be (`digest`)."""

    model: str
    format: str
    digest: str = ""

    def __post_init__(self) -> None:
        if self.digest and not DIGEST.fullmatch(self.digest):
            raise ValueError("digest must be 64 hexadecimal digits")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """How many devices a round asks, wants and needs, and how long it waits. Times in seconds of the store's clock.

    `owner_share` is the part of what makes a release that the devices of one owner may fill together (at least one device);
    None sets no bound, and is all that a coordinator without identities can do.

    `mode` "async": a release is made of the next `buffer` updates, whichever devices they come from, if none starts from
    a release more than `max_staleness` older than the one they are applied to. Without a mode a run goes in rounds.
    """

    goal: int = 0
    minimum: int = 1
    over_selection: float = 1.0
    deadline_s: float = 3600.0
    max_attempts: int = 20
    owner_share: float | None = dataclasses.field(default=None, metadata=spec.LATER)
    mode: Literal["sync", "async"] | None = dataclasses.field(default=None, metadata=spec.LATER)
    buffer: int | None = dataclasses.field(default=None, metadata=spec.LATER)
    max_staleness: int | None = dataclasses.field(default=None, metadata=spec.LATER)

    def __post_init__(self) -> None:
        self._check_mode()
        if not 1 <= self.minimum <= self.size <= 1 << 15:
            raise ValueError(f"expected 1 <= minimum <= {'buffer' if self.goal == 0 else 'goal'} <= 32768")
        if not 1.0 <= self.over_selection <= 10.0:
            raise ValueError("over_selection must lie between 1 and 10")
        if not 0 < self.deadline_s <= 30 * 86400:
            raise ValueError("deadline_s must be positive and at most 30 days")
        if self.max_attempts < 1:
            raise ValueError("max_attempts must be at least 1")
        if self.owner_share is not None and not 0.0 < self.owner_share <= 1.0:
            raise ValueError("owner_share must lie above 0 and not above 1")

    @property
    def owner_seats(self) -> int | None:
        """The most devices of one owner in a round."""
        return None if self.owner_share is None else max(1, int(self.owner_share * self.size))

    @property
    def size(self) -> int:
        """How many updates make a release."""
        return self.goal if self.buffer is None else self.buffer

    def _check_mode(self) -> None:
        given = (self.buffer is not None, self.max_staleness is not None)
        if self.mode != "async" and any(given):
            raise ValueError('buffer and max_staleness need mode = "async"')
        if self.mode != "async" and self.goal == 0:
            raise ValueError("missing key 'goal'")
        if self.mode == "async" and (not all(given) or self.goal):
            raise ValueError('mode = "async" needs buffer and max_staleness, and has no goal')
        if not 0 <= (self.max_staleness or 0) <= 1000:
            raise ValueError("max_staleness must lie between 0 and 1000")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The part of each device's own text that is held out, and how many sequences of it a round's evaluation reads."""

    fraction: float = 0.2
    max_sequences: int = 16

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0 or self.max_sequences < 1:
            raise ValueError("expected 0 < fraction < 1 and max_sequences >= 1")


LONGEST_CHAIN = 16


@dataclasses.dataclass(frozen=True)
class Downlink:
    """How releases travel: each as what it adds to the one before, coded by `codec`. A device is given at most
    `longest_chain` of these in a row, and the whole adapter beyond. What the codec loses is added to the next release,
    `decay` times (arXiv 1905.05957).
    """

    codec: tuple[Plain, ...] | str
    longest_chain: int = LONGEST_CHAIN
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.longest_chain <= LONGEST_CHAIN:
            raise ValueError(f"longest_chain must lie between 1 and {LONGEST_CHAIN}")
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError("decay must lie between 0 and 1")

    def chain(self) -> Chain:
        """The codec of releases. Raises SpecError."""
        try:
            return chain.codec(self.codec)
        except SpecError as error:
            raise SpecError(f"downlink.{error}") from error


@dataclasses.dataclass(frozen=True)
class Rates:
    """How a codec's bits are spread over the rounds: the last round's updates and release have `growth` times the first's, each
    `growth^(1 / (rounds - 1))` times those before, and the mean is the codec's target.

    What a codec loses is sent later, so early bits are worth little and what the last rounds lose is lost.
    """

    growth: float = 8.0

    def __post_init__(self) -> None:
        if not 0.01 <= self.growth <= 1000:
            raise ValueError("growth must lie between 0.01 and 1000")

    def share(self, number: int, rounds: int) -> float:
        """What round `number` of `rounds` has of the mean."""
        each = [math.pow(self.growth, n / max(1, rounds - 1)) for n in range(rounds)]
        return each[number - 1] * rounds / sum(each)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Devices train on a part of their text that stands for all of it: one sequence of each of as many groups as `share` of their
    number (FedHDS, arXiv 2410.10926), chosen on the device by what the base makes of them.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError("share must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run: base model, tuning method, codec, aggregation and schedule. The tables are rows of their families.

    Two forms of update travel: a delta, coded by `codec`; and scalars along `directions`. A run admits those it has a
    rule for. `forward_method` is for devices that cannot compute gradients. Whoever creates a run fills `directions` from
    its methods, and takes `codec` away if none of them sends deltas. Without a `downlink` releases travel as whole adapters.
    `rates` spreads the bits of a codec that has a target over the rounds. `portions` says which part of the layout a device sends
    in a round; without it, and without history in the layout, all. `start` is the SHA-256 of the adapter that the run begins
    with, float32 and little-endian, where that does not follow from the method and the seed. With a `selection` devices
    train on a part of their text.
    """

    name: str
    base: BaseRef
    rounds: int
    cohort: Cohort
    method: Plain
    codec: tuple[Plain, ...] | str | None = "top_k_int4"
    aggregator: Plain = dataclasses.field(default_factory=lambda: {"id": "mean", "weight_by": "examples"})
    server_optimizer: Plain = dataclasses.field(default_factory=lambda: {"id": "average"})
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    forward_method: Plain | None = dataclasses.field(default=None, metadata=spec.since(1))
    directions: Directions | None = dataclasses.field(default=None, metadata=spec.since(1))
    downlink: Downlink | None = dataclasses.field(default=None, metadata=spec.LATER)
    portions: Plain | None = dataclasses.field(default=None, metadata=spec.LATER)
    start: str | None = dataclasses.field(default=None, metadata=spec.LATER)
    rates: Rates | None = dataclasses.field(default=None, metadata=spec.LATER)
    selection: Selection | None = dataclasses.field(default=None, metadata=spec.LATER)

    def __post_init__(self) -> None:
        if self.codec is None and self.directions is None:
            raise ValueError("a run without a codec needs directions: nothing could be sent")
        if self.start is not None and not DIGEST.fullmatch(self.start):
            raise ValueError("start must be 64 hexadecimal digits; `edgetune run create --start-from` fills it in")
        if not NAME.fullmatch(self.name):
            raise ValueError("name must be 1 to 64 of a-z 0-9 . _ - and start with a letter or digit")
        if not 1 <= self.rounds <= 1_000_000:
            raise ValueError("rounds must lie between 1 and 1,000,000")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError("seed must lie between 0 and 2^63 - 1")

    @property
    def digest(self) -> str:
        return spec.digest(self)

    @property
    def edition(self) -> int:
        """The earliest edition that can say this run: programs that know only earlier ones cannot take part in it."""
        rows = _ids([self.method, self.forward_method, self.codec, self.aggregator, self.server_optimizer])
        return max(spec.edition(self), 1 if FIRST.issuperset(rows) else 2)

    def chain(self) -> Chain | None:
        """The codec of deltas, None for a run that admits none. Raises SpecError."""
        return None if self.codec is None else chain.codec(self.codec)

    def encoder(self, codec: Chain, number: int) -> Chain:
        """What encodes round `number`'s updates, or its release, for `codec` to decode."""
        return codec if self.rates is None else codec.rated(self.rates.share(number, self.rounds))


def _ids(plain: Any) -> set[str]:
    """The rows that plain tables name, those inside of others included."""
    if isinstance(plain, Mapping):
        return {plain["id"]}.union(*map(_ids, plain.values())) if "id" in plain else set()
    return set[str]().union(*map(_ids, plain)) if isinstance(plain, list | tuple) else set()


def parse(table: Any, where: str = "run spec") -> RunSpec:
    """A checked RunSpec from a plain table, with its codecs expanded to stages. Raises SpecError naming the key."""
    run = spec.parse(RunSpec, table, where)
    codec = None if run.codec is None else parse_codec(run.codec)
    downlink = run.downlink and dataclasses.replace(run.downlink, codec=_stages(run.downlink.chain()))
    return dataclasses.replace(run, codec=codec, downlink=downlink)


def check_mode(run: RunSpec) -> None:
    """Raises SpecError for a run that cannot be asynchronous and says it is. Scalars along directions of the round, of a
    pool or with a curvature mean something beside the others of their release alone; deltas, and scalars along a device's
    own directions, can be added to a later one; but not along a subspace that changes between releases."""
    found = run.directions
    if run.cohort.mode == "async" and run.codec is None and found is not None and found.drawn != "device":
        raise SpecError(
            f'cohort: mode = "async" takes deltas, or directions of each device (method mezo), not of a {found.drawn}'
        )
    if run.cohort.mode == "async" and found is not None and found.subspace is not None and found.subspace.refresh:
        raise SpecError('cohort: mode = "async" takes scalars along a subspace that stays: refresh = 0')


def parse_codec(described: str | Sequence[Plain]) -> tuple[Plain, ...]:
    """A codec, by name or by stages, as the stages that a frozen spec holds. Raises SpecError."""
    return _stages(chain.codec(described))


def recoded(run: RunSpec, codec: str | None = None, downlink: str | None = None) -> RunSpec:
    """The run with a named codec for updates, for releases, or both; None leaves what is there. Raises SpecError."""
    if codec is not None:
        run = dataclasses.replace(run, codec=parse_codec(codec))
    if downlink is not None:
        stages = parse_codec(downlink)
        made = Downlink(stages) if run.downlink is None else dataclasses.replace(run.downlink, codec=stages)
        run = dataclasses.replace(run, downlink=made)
    return run


def _stages(codec: Chain) -> tuple[Plain, ...]:
    return tuple(spec.plain(stage) for stage in codec.stages)


def read_toml(path: Path) -> RunSpec:
    """A RunSpec from a TOML file. Raises SpecError naming the file, and the line where TOML itself is wrong."""
    import tomllib  # needed here alone: a client gets its spec as JSON, and counts megabytes

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{path}: no such file; `edgetune run create --help` shows a spec to start from") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not TOML: {error}") from error
    with of_file(path):
        return parse(table, str(path))


@contextlib.contextmanager
def of_file(path: Path) -> Iterator[None]:
    """A SpecError within names the file, also where only a table of it was looked at."""
    try:
        yield
    except SpecError as error:
        if str(path) in str(error):
            raise
        raise SpecError(f"{path}: {error}") from error
