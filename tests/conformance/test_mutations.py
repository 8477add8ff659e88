"""Payloads that no encoder wrote: every one decodes to finite numbers or raises PayloadError; none hangs, none asks for memory.

`make test` tries 20,000 for every decoder; `make fuzz` (`fuzz.py`) a million for each under a limit of 512 MB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from experiments.codecs import ladder
from wire.codecs import chain, kernels
from wire.codecs.chain import HEADER_BYTES, Chain
from wire.codecs.compositions import BALANCE, COMPOSITIONS, ROTATION, ecsq, ectcq
from wire.delta import Delta, Layout, Tensor
from wire.errors import PayloadError
from wire.spec import Plain

LAYOUT = Layout((Tensor("a", (4, 20), "lora_A"), Tensor("b", (18, 4), "lora_B"), Tensor("c", (3,))))
CODECS: Mapping[str, list[Plain]] = {
    **{row: several[-1] for row, several in ladder(()).items() if several},
    **COMPOSITIONS,
    "ecsq with feedback": ecsq(12.0),
    "rotated with feedback": ecsq(12.0, ROTATION),
    "balanced with feedback": ecsq(12.0, BALANCE, ROTATION),
    "trellis with feedback": ectcq(12.0),
}
PAYLOADS = 20_000


def seed_payload(codec: Chain) -> bytes:
    """What an encoder writes for entries of which some are large."""
    chance = np.random.default_rng(3)
    vector = (chance.standard_normal(LAYOUT.size) ** 3).astype(np.float32)
    return codec.encode(Delta(LAYOUT, vector), codec.init(LAYOUT))[0]


def mutated(payload: bytes, chance: np.random.Generator) -> bytes:
    """Flipped bits, overwritten, removed, repeated or added bytes after the header."""
    changed = bytearray(payload)
    for _ in range(int(chance.integers(1, 5))):
        at = int(chance.integers(HEADER_BYTES, max(HEADER_BYTES + 1, len(changed))))
        match int(chance.integers(5)):
            case 0 if at < len(changed):
                changed[at] ^= 1 << int(chance.integers(8))
            case 1:
                changed[at : at + int(chance.integers(1, 9))] = chance.bytes(4)
            case 2:
                del changed[at : at + int(chance.integers(1, 40))]
            case 3:
                changed[at:at] = changed[at : at + int(chance.integers(1, 20))]
            case _:
                changed[at:at] = chance.bytes(int(chance.integers(1, 20)))
    return bytes(changed)


def attack(codec: Chain, payloads: int, seed: int) -> int:
    """How many of `payloads` mutated ones decoded. An error that is the decoder's notes the payload."""
    chance, original, decoded = np.random.default_rng(seed), seed_payload(codec), 0
    for _ in range(payloads):
        payload = mutated(original, chance)
        try:
            decoded += harmless(codec, payload)
        except Exception as error:
            error.add_note(f"{codec}, by {payload.hex()}")
            raise
    return decoded


def harmless(codec: Chain, payload: bytes) -> bool:
    """Whether it decodes, to finite numbers of the layout, or is refused. Raises any other error."""
    try:
        vector = codec.decode(payload, LAYOUT).vector
    except PayloadError:
        return False
    assert vector.shape == (LAYOUT.size,) and np.isfinite(vector).all()
    return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(CODECS))
def test_mutated_payloads_decode_or_are_refused(name: str) -> None:
    attack(chain.codec(CODECS[name]), PAYLOADS, 11)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["ecsq with feedback", "rotated with feedback", "trellis with feedback", "qsgd"])
def test_the_compiled_loops_stand_them_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", 0)
    attack(chain.codec(CODECS[name]), PAYLOADS, 12)
