"""Low-rank adapters: `lora` tunes the factors (arXiv 2106.09685), or B alone over a fixed A (FFA-LoRA, arXiv 2403.12313);
`lora_sb` tunes an r x r core between fixed factors (Fed-SB, arXiv 2502.15436; factors from the weight, arXiv 2405.17604)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from edge_client.adapters import Base, LowRank, Placement, whole_layout
from wire import spec
from wire.delta import Layout, Role, Tensor, Vector, layer_number
from wire.errors import SpecError

ALL = "all-linear"
PREFIX = "base_model.model."
"""What peft puts before a module's name."""
OVERSAMPLED = 8
POWER_ITERATIONS = 3


def targeted(base: Base, targets: tuple[str, ...] | str, layers: int | None) -> dict[str, tuple[int, int]]:
    """The linear modules named by `targets` ("q_proj", whole names or "all-linear") in the last `layers` layers.

    Raises SpecError for a name that no module has.
    """
    modules = last_layers(base.linears(), layers)
    if targets == ALL:
        return modules
    for target in targets:
        if not any(_matches(module, target) for module in modules):
            kinds = sorted({module.rsplit(".", 1)[-1] for module in modules})
            raise SpecError(f"targets: no module {target!r} in this base; it has {', '.join(kinds)}")
    return {m: shape for m, shape in modules.items() if any(_matches(m, target) for target in targets)}


def last_layers(modules: Mapping[str, tuple[int, int]], layers: int | None) -> dict[str, tuple[int, int]]:
    """The modules of the last `layers` layers; None: all."""
    if layers is None:
        return dict(modules)
    first = 1 + max((layer_number(m) or 0 for m in modules), default=0) - layers
    return {m: shape for m, shape in modules.items() if (layer_number(m) or 0) >= first}


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)


def check_targets(targets: tuple[str, ...] | str) -> None:
    """Raises ValueError for anything but names or "all-linear"."""
    if (isinstance(targets, str) and targets != ALL) or not targets:
        raise ValueError(f"targets must be {ALL!r} or a list of module names")


def check_sizes(rank: int, alpha: float, layers: int | None) -> None:
    if not 1 <= rank <= 1024:
        raise ValueError("rank must lie between 1 and 1024")
    if alpha <= 0:
        raise ValueError("alpha must be positive")
    if layers is not None and layers < 1:
        raise ValueError("layers must be at least 1")


def uniform(stream: np.random.Philox, rank: int, columns: int) -> Vector:
    """A [rank, columns] uniform in ±1/sqrt(columns), from Philox's own bits: the same on every machine."""
    raw = (stream.random_raw(rank * columns) >> np.uint64(40)).astype(np.float32)  # 24 bits: exact in float32
    drawn: Vector = (raw * np.float32(2.0**-23) - np.float32(1)) * np.float32(1 / math.sqrt(columns))
    return drawn.reshape(rank, columns)


@dataclasses.dataclass(frozen=True)
class LoraFactors:
    """Factors A [rank, in] and B [out, rank]; y += alpha / rank · B A x. With `tuned` "B", A is fixed by `seed`.

    `targets` are module names or their last parts ("q_proj"), or "all-linear"; `layers` keeps to the last ones.

    `history` is the rank of a second term that no device tunes, at the same scale: an aggregator keeps there what earlier
    rounds came to (FLoRA, arXiv 2409.05976; FedEx-LoRA, arXiv 2410.09432). `keeps` is what a device has of its own: B
    (FedSA-LoRA, arXiv 2410.01463) or a second pair of the same rank (FDLoRA, arXiv 2406.07925; FedDPA, arXiv 2403.19211).
    With `start` "leading", A and B start as the leading singular directions of the weight and a fixed term takes them away
    again (FeDeRA, arXiv 2404.18848): the quantized weight stays as it is. `full` is the run's rank where this device's is
    smaller: fixed factors are the first of its.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ALL
    layers: int | None = None
    tuned: Literal["A and B", "B"] = "A and B"
    seed: int = 0
    history: int | None = dataclasses.field(default=None, metadata=spec.LATER)
    keeps: Literal["B", "pair"] | None = dataclasses.field(default=None, metadata=spec.LATER)
    start: Literal["leading"] | None = dataclasses.field(default=None, metadata=spec.LATER)
    full: int | None = dataclasses.field(default=None, metadata=spec.LATER)
    id: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        check_sizes(self.rank, self.alpha, self.layers)
        check_targets(self.targets)
        if self.history is not None and not 1 <= self.history <= 65_536:
            raise ValueError("history must lie between 1 and 65,536")
        if self.tuned == "B" and (self.keeps == "B" or self.start is not None):
            raise ValueError('tuned = "B" fixes A by a seed and sends B: neither keeps = "B" nor a start goes with it')

    def narrowed(self, rank: int) -> LoraFactors:
        rank, full = min(rank, self.rank), self.full or self.rank
        return dataclasses.replace(self, rank=rank, alpha=self.alpha * rank / self.rank, full=full)

    def layout(self, base: Base) -> Layout:
        shapes = targeted(base, self.targets, self.layers)
        if self.start == "leading":
            _check_weights(base, shapes)
        return Layout(tuple(t for module, shape in shapes.items() for t in self._shared(module, *shape)))

    def personal(self, base: Base) -> Layout | None:
        if self.keeps is None:
            return None
        shapes = targeted(base, self.targets, self.layers)
        return Layout(tuple(t for module, shape in shapes.items() for t in self._personal(module, *shape)))

    def _shared(self, module: str, rows: int, columns: int) -> tuple[Tensor, ...]:
        a, b = _pair(module, rows, columns, self.rank)
        pair = (b,) if self.tuned == "B" else (a,) if self.keeps == "B" else (a, b)
        return pair if self.history is None else pair + _history(module, rows, columns, self.history)

    def _personal(self, module: str, rows: int, columns: int) -> tuple[Tensor, ...]:
        if self.keeps == "B":
            return _pair(module, rows, columns, self.rank)[1:]
        return _pair(module, rows, columns, self.rank, ".personal")

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        """A uniform in ±1/sqrt(columns), B zero: the adapter starts as nothing, and the bits are Philox's own."""
        stream = np.random.Philox(key=seed)
        adapter = np.zeros(layout.size, np.float32)
        for tensor, place in layout.slices():
            if tensor.role == "lora_A":
                adapter[place] = uniform(stream, *tensor.shape).reshape(-1)
        if self.start == "leading":
            self._lead(adapter, layout, base)
        return adapter

    def _lead(self, adapter: Vector, layout: Layout, base: Base | None) -> None:
        if base is None:
            raise SpecError('start = "leading" follows from the weights: the base is needed')
        places = {tensor.name: place for tensor, place in layout.slices()}
        for module in targeted(base, self.targets, self.layers):
            for part, found in zip(
                "AB", leading(base.dequantized(f"{module}.weight"), self.rank, self.full), strict=True
            ):
                if place := places.get(f"{PREFIX}{module}.lora_{part}.weight"):
                    adapter[place] = found.reshape(-1)

    def placement(self, base: Base) -> Placement:
        places = {tensor.name: place for tensor, place in whole_layout(self, base).slices()}
        shapes = targeted(base, self.targets, self.layers)
        stream = np.random.Philox(key=self.seed)
        return Placement(
            {module: self._terms(module, columns, places, stream, base) for module, (_, columns) in shapes.items()}
        )

    def _terms(
        self, module: str, columns: int, places: Mapping[str, slice], stream: np.random.Philox, base: Base
    ) -> tuple[LowRank, ...]:
        scale = self.alpha / self.rank

        def pair(kind: str) -> tuple[slice | None, slice]:
            path = f"{PREFIX}{module}.lora"
            return places.get(f"{path}_A{kind}.weight"), places[f"{path}_B{kind}.weight"]

        def term(rank: int, a: slice | Vector | None, b: slice | Vector, sign: float = 1.0) -> LowRank:
            return LowRank(
                rank, sign * scale, uniform(stream, self.full or self.rank, columns)[: self.rank] if a is None else a, b
            )

        terms = [term(self.rank, *pair(""))]
        if self.history is not None:
            terms.append(term(self.history, *pair(".history")))
        if self.keeps == "pair":
            terms.append(term(self.rank, *pair(".personal")))
        if self.start == "leading":
            terms.append(term(self.rank, *leading(base.dequantized(f"{module}.weight"), self.rank, self.full), -1.0))
        return tuple(terms)


def _pair(module: str, rows: int, columns: int, rank: int, kind: str = "") -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{PREFIX}{module}.lora_A{kind}.weight", (rank, columns), "lora_A"),
        Tensor(f"{PREFIX}{module}.lora_B{kind}.weight", (rows, rank), "lora_B"),
    )


def _history(module: str, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    a, b = _pair(module, rows, columns, rank, ".history")
    return dataclasses.replace(a, role="history_A"), dataclasses.replace(b, role="history_B")


def _check_weights(base: Base, modules: Mapping[str, tuple[int, int]]) -> None:
    """Raises SpecError for a base that has no leading directions."""
    if not base.dequantized(f"{next(iter(modules))}.weight").any():
        raise SpecError("this base's weights are zero: they have no directions to start from or to stand between")


@dataclasses.dataclass(frozen=True)
class LoraCore:
    """A core R [rank, rank] between fixed factors of each weight's leading singular directions: y += alpha / rank · B R A x.

    With rank 8 on all linear layers of SmolLM2-135M that is 13,440 numbers: few enough for zeroth order to find its way. `full`
    is the run's rank where this device's is smaller: the factors are the first of its.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] | str = ALL
    layers: int | None = None
    full: int | None = dataclasses.field(default=None, metadata=spec.LATER)
    id: ClassVar[str] = "lora_sb"

    def __post_init__(self) -> None:
        check_sizes(self.rank, self.alpha, self.layers)
        check_targets(self.targets)

    def narrowed(self, rank: int) -> LoraCore:
        rank, full = min(rank, self.rank), self.full or self.rank
        return dataclasses.replace(self, rank=rank, alpha=self.alpha * rank / self.rank, full=full)

    def layout(self, base: Base) -> Layout:
        modules = targeted(base, self.targets, self.layers)
        _check_weights(base, modules)
        role: Role = "core"
        return Layout(tuple(Tensor(f"{PREFIX}{m}.lora_core.weight", (self.rank, self.rank), role) for m in modules))

    def personal(self, base: Base) -> Layout | None:
        return None

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        return np.zeros(layout.size, np.float32)

    def placement(self, base: Base) -> Placement:
        linears = {}
        for tensor, place in self.layout(base).slices():
            module = tensor.name.removeprefix(PREFIX).removesuffix(".lora_core.weight")
            a, b = leading(base.dequantized(f"{module}.weight"), self.rank, self.full)
            linears[module] = (LowRank(self.rank, self.alpha / self.rank, a, b, place),)
        return Placement(linears)


def leading(weight: Vector, rank: int, full: int | None = None) -> tuple[Vector, Vector]:
    """A [rank, in] and B [out, rank]: the leading singular directions of `weight` [out, in], each times sqrt(value); the first
    `rank` of `full` ones, where `full` is given.

    By randomized subspace iteration (arXiv 0909.4061) from fixed bits. Each pair's sign is set by its largest entry, so
    that machines whose linear algebra differs in the last bits agree in all the others.
    """
    width = min((full or rank) + OVERSAMPLED, *weight.shape)
    basis = uniform(np.random.Philox(key=0), width, weight.shape[1]).T
    for _ in range(POWER_ITERATIONS):
        left, _ = np.linalg.qr(weight @ basis)
        basis, _ = np.linalg.qr(weight.T @ left)
    left, values, right = np.linalg.svd(weight @ basis, full_matrices=False)
    rows = right @ basis.T
    keep = min(rank, width)
    a, b = np.zeros((rank, weight.shape[1]), np.float32), np.zeros((weight.shape[0], rank), np.float32)
    root = np.sqrt(values[:keep])
    signs = np.sign(rows[np.arange(keep), np.abs(rows[:keep]).argmax(axis=1)])
    a[:keep] = rows[:keep] * (signs * root)[:, None]
    b[:, :keep] = left[:, :keep] * (signs * root)
    return a, b
