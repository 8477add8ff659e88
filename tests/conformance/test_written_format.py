"""docs/wire-format.md is enough to read `ecsq`: a decoder of plain integers, written from it alone, and goldens with escapes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from tests.conformance.fuzz import LOOPS
from tests.conformance.test_codecs import CODECS, GOLDEN, LAYOUT, heavy_tailed
from wire.codecs import chain, kernels
from wire.codecs.chain import HEADER_BYTES
from wire.delta import Delta, Vector
from wire.spec import Plain

ESCAPING: dict[str, tuple[Plain, int]] = {
    "ecsq_escapes": ({"id": "ecsq", "target_bits": 8.0}, 2),
    "ectcq_escapes": ({"id": "ecsq", "target_bits": 12.0, "states": 8}, 3),
}
"""Payload -> its stage, and the power that makes the tails so heavy that some levels have no symbol."""
PLAIN = [f"{name}.{number}" for name in ("ecsq_at_4", "ectcq_at_4") for number in (1, 2)]
LANES = 4
"""Below 2^16 entries."""


def stages(name: str) -> list[Plain]:
    return [ESCAPING[name][0], {"id": "pack"}] if name in ESCAPING else CODECS[name.split(".")[0]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Frequencies of the symbols 0 to 255, centroids of levels of 1, of 2 and above."""

    frequencies: list[int]
    centroids: list[int]


@dataclasses.dataclass(frozen=True)
class Coded:
    """The fields of a payload."""

    step: np.float32
    tables: list[Table]
    class_frequencies: list[int]
    classes: list[int]
    escapes: list[int]
    words: list[int]


def fields(body: bytes, quantizers: int) -> Coded:
    step, at, found = np.frombuffer(body[:4], "<f4")[0], 4, []
    for kind in ("u1", "<u2", "<i2", "<u2"):
        count, size = int.from_bytes(body[at : at + 4], "little"), np.dtype(kind).itemsize
        found.append(np.frombuffer(body[at + 4 : at + 4 + count * size], kind).tolist())
        at += 4 + count * size
    assert at == len(body)
    return Coded(step, *_tables(found[0], quantizers), *found[1:])


def _tables(data: list[int], quantizers: int) -> tuple[list[Table], list[int]]:
    numbers = iter(data)
    count, tables = next(numbers), []
    for _ in range(count * quantizers):
        largest, centroids = next(numbers), [(next(numbers) + 128) % 256 - 128 for _ in range(3)]
        levels = [_number(numbers) for _ in range(largest + 1)] + [0] * (127 - largest)
        both = [levels[0], *(frequency for level in levels[1:] for frequency in (level, level))]
        tables.append(Table([*both, 4096 - sum(both)], centroids))
    classes = [_number(numbers) for _ in range(count + 1)]
    assert next(numbers, None) is None and sum(classes) == 4096
    return tables, classes


def _number(numbers: Iterator[int]) -> int:
    low = next(numbers)
    return low if low < 128 else low - 128 + 128 * next(numbers)


class Lanes:
    """Interleaved static rANS."""

    def __init__(self, words: list[int], lanes: int) -> None:
        self._states = [words[2 * lane] + (words[2 * lane + 1] << 16) for lane in range(lanes)]
        self._words = iter(words[2 * lanes :])

    def symbol(self, lane: int, frequencies: Sequence[int]) -> int:
        state, found, below = self._states[lane], 0, 0
        while below + frequencies[found] <= state % 4096:
            below, found = below + frequencies[found], found + 1
        state = frequencies[found] * (state // 4096) + state % 4096 - below
        self._states[lane] = state if state >= 1 << 16 else (state << 16) + next(self._words)
        return found

    def close(self) -> None:
        assert next(self._words, None) is None and set(self._states) == {1 << 16}


def rows() -> list[list[int]]:
    """The places of each rank row of LAYOUT in its vector."""
    found = []
    for tensor, place in LAYOUT.slices():
        places = np.arange(place.start, place.stop).reshape(tensor.shape)
        found += {"lora_A": places, "lora_B": places.T, "other": places.reshape(1, -1)}[tensor.role].tolist()
    return found


def read(coded: Coded, quantizers: int, by_the_letter: bool = True) -> tuple[Vector, list[int]]:
    """The vector, and which quantizer met each escape. Not by the letter: its centroid is that quantizer's."""
    vector, paths = np.zeros(LAYOUT.size, np.float32), [0] * LANES
    met: list[int] = []
    by_row, lanes, escapes = Lanes(coded.classes, 1), Lanes(coded.words, LANES), iter(coded.escapes)
    used = [by_row.symbol(0, coded.class_frequencies) for _ in rows()]
    for places, of_row in zip(rows(), used, strict=True):
        for j, place in enumerate(places if of_row else []):
            q = paths[j % LANES] & 1 if quantizers == 2 else 0
            mine = coded.tables[quantizers * (of_row - 1) : quantizers * of_row]
            symbol = lanes.symbol(j % LANES, mine[q].frequencies)
            if symbol == 255:
                level = next(escapes)
                met.append(q)
                centroid, lies = mine[0 if by_the_letter else q].centroids[2], abs(level)
            else:
                level = (symbol + 1) // 2 * (1 if symbol % 2 else -1)
                centroid, lies = mine[q].centroids[min(abs(level), 3) - 1], quantizers * abs(level) - q
            if level:
                vector[place] = np.copysign(coded.step * np.float32(lies + centroid / 128), level)
            paths[j % LANES] = (paths[j % LANES] >> 1) ^ 5 * q ^ 2 * ((symbol + 1) // 2 % 2)
    by_row.close()
    lanes.close()
    assert next(escapes, None) is None
    return vector, met


def coded(name: str) -> tuple[Coded, int]:
    quantizers = 2 if name.startswith("ectcq") else 1
    return fields((GOLDEN / f"{name}.bin").read_bytes()[HEADER_BYTES:], quantizers), quantizers


@pytest.mark.parametrize("name", sorted(ESCAPING))
def test_golden_payloads_with_escapes_decode_for_ever(name: str, rewrite_golden: bool) -> None:
    codec, (file, kept) = chain.codec(stages(name)), (GOLDEN / f"{name}.{end}" for end in ("bin", "f32.sha256"))
    if rewrite_golden:
        heavy = np.copysign(
            np.abs(heavy_tailed(LAYOUT.size)).astype(np.float64) ** ESCAPING[name][1], heavy_tailed(LAYOUT.size)
        )
        file.write_bytes(codec.encode(Delta(LAYOUT, heavy.astype(np.float32)), codec.init(LAYOUT))[0])
        kept.write_text(hashlib.sha256(codec.decode(file.read_bytes(), LAYOUT).vector.tobytes()).hexdigest() + "\n")
    decoded = codec.decode(file.read_bytes(), LAYOUT).vector
    assert hashlib.sha256(decoded.tobytes()).hexdigest() == kept.read_text().strip()


@pytest.mark.parametrize("loops", ["numpy", "compiled"])
@pytest.mark.parametrize("name", [*sorted(ESCAPING), *PLAIN])
def test_a_decoder_written_from_the_format_reads_the_same_bits(
    name: str, loops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LARGE", LOOPS[loops])
    expected = chain.codec(stages(name)).decode((GOLDEN / f"{name}.bin").read_bytes(), LAYOUT).vector
    found, met = read(*coded(name))
    assert found.tobytes() == expected.tobytes() and bool(met) == (name in ESCAPING)


def test_the_golden_trellis_tells_whose_centroid_an_escape_takes() -> None:
    by_the_letter, met = read(*coded("ectcq_escapes"))
    otherwise, _ = read(*coded("ectcq_escapes"), by_the_letter=False)
    assert set(met) == {0, 1} and not np.array_equal(by_the_letter, otherwise)
