from __future__ import annotations

import numpy as np
import pytest
import torch

from quantize.formats import BLOCK, FORMATS, SCHEMES

ROWS, COLUMNS = 24, 128


def weights(seed: int = 0) -> np.ndarray:
    chance = np.random.Generator(np.random.Philox(key=seed))
    made = chance.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.05)
    made[0, :BLOCK] = 0  # a block of zeros must stay one
    return made


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_stores_what_it_declares(scheme: str) -> None:
    parts = SCHEMES[scheme].encode(weights())
    declared = SCHEMES[scheme].stored((ROWS, COLUMNS))
    assert {suffix: part.size for suffix, part in parts.items()} == {s: np.prod(d[1]) for s, d in declared.items()}


@pytest.mark.parametrize(
    ("scheme", "steps"),
    [("nf4", 0.152), ("int8", 0.5 / 127 * 1.001), ("bf16", 2.0**-8), ("f32", 0.0)],
)
def test_every_scheme_is_off_by_half_its_widest_step_at_most(scheme: str, steps: float) -> None:
    values = weights()
    back = SCHEMES[scheme].decode(SCHEMES[scheme].encode(values), values.shape)
    largest = np.abs(values).reshape(-1, BLOCK).max(axis=1, keepdims=True)
    assert (np.abs(back - values).reshape(-1, BLOCK) <= steps * largest).all()
    assert not back[0, :BLOCK].any()


def test_nf4_is_bit_for_bit_what_bitsandbytes_makes() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = weights(1)
    codes, state = quantize_4bit(torch.from_numpy(values), blocksize=BLOCK, quant_type="nf4")
    ours = SCHEMES["nf4"].encode(values)
    assert np.array_equal(ours[".codes"], codes.numpy().reshape(-1))
    assert np.array_equal(ours[".absmax"], state.absmax.numpy())
    theirs = dequantize_4bit(codes, state).numpy()
    assert np.array_equal(SCHEMES["nf4"].decode(ours, values.shape), theirs)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = weights(2)
    ours = SCHEMES["bf16"].encode(values)[""]
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours, theirs)


def test_every_format_names_a_scheme() -> None:
    assert {scheme for f in FORMATS.values() for scheme in (f.linear, f.table)} <= set(SCHEMES)
