"""What low-rank factors come to: products B·A that are added, cut and compared by their factors, and never formed.

All arithmetic is float64. A product of [out, in] stays a pair of factors, `Product`: B [out, rank] and A [rank, in].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from wire.delta import RANK_AXES, Layout, Role, Tensor, Vector
from wire.errors import SpecError
from wire.portions import Portion

Matrix = npt.NDArray[np.float64]
OVERSAMPLED = 8
POWER_ITERATIONS = 2
NOISE = 1e-9
"""Singular values below this part of what was added up are its rounding: float32 resolves 6e-8."""
LETTER = re.compile(r"lora_[AB](\.history)?")


@dataclasses.dataclass(frozen=True)
class Product:
    """B [out, rank] and A [rank, in], float64."""

    b: Matrix
    a: Matrix

    @property
    def rank(self) -> int:
        return len(self.a)

    def times(self, weight: float) -> Product:
        """`weight` times the product; the weight goes on A."""
        return Product(self.b, weight * self.a)

    def cut(self, rank: int | None) -> Product:
        """Its first `rank` terms; all for None."""
        return Product(self.b[:, :rank], self.a[:rank])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: its number in the layout, its first entry in the flat vector, and the tensor."""

    number: int
    first: int
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def of(self, vector: Vector) -> Vector:
        """The tensor, a view of `vector`."""
        return vector[self.first : self.first + self.tensor.size].reshape(self.shape)


def places(layout: Layout) -> list[Place]:
    """Every tensor's."""
    return [Place(number, entries.start, tensor) for number, (tensor, entries) in enumerate(layout.slices())]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors of one module, and the frozen ones that keep what earlier rounds came to, where the layout has them."""

    a: Place
    b: Place
    history: Pair | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def of(self, vector: Vector) -> Product:
        """The pair's product in `vector`."""
        return Product(self.b.of(vector).astype(np.float64), self.a.of(vector).astype(np.float64))

    def put(self, product: Product, vector: Vector) -> None:
        """Write a product of the pair's rank."""
        self.b.of(vector)[...], self.a.of(vector)[...] = product.b, product.a


def pairs(layout: Layout) -> list[Pair]:
    """Every module whose A and B both lie in `layout`. Raises SpecError where there is none."""
    found: dict[str, dict[Role, Place]] = {}
    for place in places(layout):
        found.setdefault(LETTER.sub("", place.tensor.name), {})[place.tensor.role] = place
    made = [_pair(roles) for roles in found.values() if "lora_A" in roles and "lora_B" in roles]
    if not made:
        raise SpecError("aggregator: it multiplies LoRA's factors, and this layout has no module with both A and B")
    return made


def _pair(roles: dict[Role, Place]) -> Pair:
    kept = Pair(roles["history_A"], roles["history_B"]) if "history_A" in roles and "history_B" in roles else None
    return Pair(roles["lora_A"], roles["lora_B"], kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """One device's: what it adds to the adapter, float32 [layout.size], what it counts, and its portion, if it has one."""

    vector: Vector
    weight: int
    portion: Portion | None = None

    @property
    def rank(self) -> int | None:
        return None if self.portion is None else self.portion.rank

    def has(self, *places: Place) -> bool:
        """Whether the device tuned one of these tensors."""
        return self.portion is None or any(place.number in self.portion.chosen for place in places)


@dataclasses.dataclass(frozen=True)
class Term:
    """A device's product, and its share of those that tuned the module: all shares come to 1."""

    share: float
    product: Product


def terms(pair: Pair, start: Vector, updates: Iterable[Update]) -> list[Term]:
    """The products of the devices that tuned a module, each of its own rank."""
    owners = [update for update in updates if update.has(pair.a, pair.b)]
    whole = sum(update.weight for update in owners)
    return [Term(update.weight / whole, _tuned(pair, start, update)) for update in owners]


def _tuned(pair: Pair, start: Vector, update: Update) -> Product:
    before, moved = pair.of(start), pair.of(update.vector)
    return Product(before.b + moved.b, before.a + moved.a).cut(update.rank)


def total(parts: Sequence[Product]) -> Product:
    """The sum of products, of the sum of their ranks."""
    return Product(np.concatenate([p.b for p in parts], axis=1), np.concatenate([p.a for p in parts]))


def weighted(parts: Iterable[Term]) -> list[Product]:
    """Each product times its share."""
    return [term.product.times(term.share) for term in parts]


def nearest(product: Product, rank: int, spare: Matrix) -> Product:
    """The nearest product of `rank`: its leading singular directions, each times the root of its value, the largest first.

    By subspace iteration on the factors (arXiv 0909.4061), exact where the rank suffices, and within a hundredth of the
    smallest possible error for products of pure noise. Each direction's sign is
    set by its largest entry, so that machines whose linear algebra rounds otherwise agree. Directions that have no value
    get the rows of `spare` [rank, in] and zeros in B, so that they can be learned later: zeros in both could not.
    """
    width = min(product.rank, rank + OVERSAMPLED, *product.b.shape[:1], *product.a.shape[1:])
    start = np.random.Generator(np.random.Philox(key=0)).uniform(-1, 1, (product.rank, width))
    basis, _ = np.linalg.qr(product.a.T @ start)
    for _ in range(POWER_ITERATIONS):
        left, _ = np.linalg.qr(product.b @ (product.a @ basis))
        basis, _ = np.linalg.qr(product.a.T @ (product.b.T @ left))
    left, values, right = np.linalg.svd(product.b @ (product.a @ basis), full_matrices=False)
    keep = int((values[:rank] > NOISE * np.linalg.norm(product.a) * np.linalg.norm(product.b)).sum())
    rows, root = right[:keep] @ basis.T, np.sqrt(values[:keep])
    root = np.copysign(root, rows[np.arange(keep), np.abs(rows).argmax(axis=1)])
    made = Product(np.zeros((product.b.shape[0], rank)), spare.astype(np.float64))
    made.b[:, :keep], made.a[:keep] = left[:, :keep] * root, rows * root[:, None]
    return made


def aggregation_error(layout: Layout, start: Vector, made: Vector, updates: Sequence[Update]) -> float | None:
    """How far the adapter `made` is from the mean of what the devices' adapters do, relative to what that mean changes:
    ‖Σ share · W(device) - W(made)‖ / ‖Σ share · W(device) - W(start)‖ in Frobenius norms, W = B·A plus history.

    0 for an exact aggregation, up to float32 rounding. Tensors without a partner (B over a fixed A, a core) count as they
    are. None for a layout without low-rank factors, and where the devices together changed nothing.
    """
    if not any(tensor.role in ("lora_A", "lora_B", "core") for tensor in layout.tensors):
        return None
    missed = moved = 0.0
    joined = _pairs_or_none(layout)
    for pair in joined:
        away, change = _gaps(pair, start, made, updates)
        missed, moved = missed + away, moved + change
    taken = {place for pair in joined for place in _places(pair)}
    for place in places(layout):
        if place not in taken:
            away, change = _plain_gaps(place, start, made, updates)
            missed, moved = missed + away, moved + change
    return float(np.sqrt(missed / moved)) if moved > 0 else None


def _pairs_or_none(layout: Layout) -> list[Pair]:
    try:
        return pairs(layout)
    except SpecError:
        return []


def _places(pair: Pair) -> list[Place]:
    return [pair.a, pair.b, *(_places(pair.history) if pair.history else [])]


def _gaps(pair: Pair, start: Vector, made: Vector, updates: Sequence[Update]) -> tuple[float, float]:
    """The squares of both norms for one module; nobody's module is missed by nothing."""
    owners = terms(pair, start, updates)
    if not owners:
        return 0.0, 0.0
    before = [] if pair.history is None else [pair.history.of(start)]
    after = [] if pair.history is None else [pair.history.of(made)]
    mean = weighted(owners)
    away = [*mean, *before, *(p.times(-1) for p in (pair.of(made), *after))]
    return square(total(away)), square(total([*mean, pair.of(start).times(-1)]))


def square(product: Product) -> float:
    """‖B·A‖² from the Gram matrices of its factors; from the product itself where that is the smaller."""
    rank = product.rank
    if rank * rank > product.b.shape[0] * product.a.shape[1]:
        return float(np.square(product.b @ product.a).sum())
    return max(0.0, float(((product.b.T @ product.b) * (product.a @ product.a.T)).sum()))


def _plain_gaps(place: Place, start: Vector, made: Vector, updates: Sequence[Update]) -> tuple[float, float]:
    """As `_gaps`, of a tensor whose effect is proportional to it."""
    owners = [update for update in updates if update.has(place)]
    if not owners:
        return 0.0, 0.0
    whole, mean = sum(update.weight for update in owners), np.zeros(place.shape)
    for update in owners:
        kept = tuple(
            slice(update.rank if axis in RANK_AXES.get(place.tensor.role, ()) else None)
            for axis in range(len(place.shape))
        )
        mean[kept] += update.weight / whole * (place.of(start)[kept] + place.of(update.vector)[kept])
    return float(np.square(mean - place.of(made)).sum()), float(np.square(mean - place.of(start)).sum())
