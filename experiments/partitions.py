"""How what a domain has is dealt to devices: by whose it is, by chance, or in unequal parts. Every item is dealt once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from wire.errors import UserError

Chance = np.random.Generator
Shares = list[list[int]]
"""For each device the numbers of its items, in the order in which it reads them."""
Item = TypeVar("Item")


def natural(keys: Sequence[str], devices: int, _: float, chance: Chance) -> Shares:
    """Whole clients, the largest first, to the device that has least; items one by one where fewer than `devices` are named."""
    by_client: dict[str, list[int]] = defaultdict(list)
    named = len(set(keys)) >= devices
    for i in chance.permutation(len(keys)).tolist():
        by_client[keys[i] if named else str(i)].append(i)
    shares: Shares = [[] for _ in range(devices)]
    for client in sorted(by_client, key=lambda client: (-len(by_client[client]), client)):
        min(shares, key=len).extend(by_client[client])
    return shares


def dirichlet(keys: Sequence[str], devices: int, alpha: float, chance: Chance) -> Shares:
    """The items of each key (topic, label) in parts drawn from Dirichlet(alpha): the smaller alpha, the more one-sided."""
    shares: Shares = [[] for _ in range(devices)]
    for key in sorted(set(keys)):
        mine = [i for i, found in enumerate(keys) if found == key]
        for share, part in zip(shares, cut(mine, chance.dirichlet([alpha] * devices)), strict=True):
            share.extend(part)
    return shares


def sizes(keys: Sequence[str], devices: int, alpha: float, chance: Chance) -> Shares:
    """Alike in kind, unlike in number: parts drawn from Dirichlet(alpha)."""
    return cut(chance.permutation(len(keys)).tolist(), chance.dirichlet([alpha] * devices))


def even(keys: Sequence[str], devices: int, _: float, chance: Chance) -> Shares:
    """Alike in kind and number."""
    return cut(chance.permutation(len(keys)).tolist(), np.full(devices, 1 / devices))


PARTITIONS: Mapping[str, Callable[[Sequence[str], int, float, Chance], Shares]] = {
    "natural": natural, "dirichlet": dirichlet, "sizes": sizes, "even": even,
}  # fmt: skip
"""Name -> (key of each item, devices, alpha, chance) -> shares. The two with an alpha are named with it: dirichlet-0.5."""
WITH_ALPHA = ("dirichlet", "sizes")


def checked(named: str, option: str = "--partitions") -> str:
    """Raises UserError, of `option`, for what `dealt` does not know."""
    name, _, alpha = named.partition("-")
    if name not in PARTITIONS or (name in WITH_ALPHA) != bool(alpha):
        raise UserError(f"{option}: unknown {named!r}; choose of natural, even, dirichlet-ALPHA, sizes-ALPHA")
    try:
        fits = not alpha or 0 < float(alpha) < float("inf")
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"{option}: {named!r}: alpha must be a positive number")
    return named


def dealt(named: str, keys: Sequence[str], devices: int, chance: Chance) -> Shares:
    """Shares in a random order. What a device lacks it is given by the one that has most: none is left with fewer than two.

    Raises UserError for too few items."""
    if len(keys) < 2 * devices:
        raise UserError(f"{len(keys)} examples for {devices} devices; each needs two or more")
    name, _, alpha = named.partition("-")
    shares = PARTITIONS[name](keys, devices, float(alpha or 0), chance)
    for share in shares:
        while len(share) < 2:
            share.append(max(shares, key=len).pop())
    return [[share[i] for i in chance.permutation(len(share))] for share in shares]


def cut(some: Sequence[Item], shares: npt.NDArray[np.float64]) -> list[list[Item]]:
    """`some` in consecutive parts of the sizes that `shares`, which sum to 1, say."""
    ends = np.rint(np.cumsum(shares) * len(some)).astype(int)
    starts = [0, *ends[:-1]]
    return [list(some[start:end]) for start, end in zip(starts, ends, strict=True)]
