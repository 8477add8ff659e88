"""What cannot code an update is refused before a run begins with it, by the stages that do not go together."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from coordinator.aggregators.mean import FixedPointSum
from coordinator.rules import check_codecs
from wire import run_spec
from wire.codecs import chain, trial
from wire.codecs.compositions import COMPOSITIONS
from wire.delta import Delta
from wire.errors import SpecError

TURN: dict[str, Any] = {"id": "rank_rotate"}
SPARSE: dict[str, Any] = {"id": "top_k", "fraction": 0.2}
PACK: dict[str, Any] = {"id": "pack"}


def spec(**changes: Any) -> run_spec.RunSpec:
    least = {
        "name": "r",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 4,
        "cohort": {"goal": 1},
        "method": {"id": "lora"},
    }
    return run_spec.parse(least | changes)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_named_codec_works_both_ways_at_every_rate(name: str) -> None:
    check_codecs(spec(codec=name, downlink={"codec": name}))
    trial.check(chain.codec(name), 0.25, "codec")
    trial.check(chain.codec(name), 4.0, "codec")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [SPARSE, {"id": "normal_float"}],
            "top_k and normal_float do not go together: normal_float loses the positions",
        ),
        ([TURN, TURN, {"id": "float32"}], "rank_rotate and rank_rotate do not go together"),
        ([{"id": "error_feedback", "inner": [TURN, {"id": "sign"}]}], "rank_rotate and sign do not go together"),
        (
            [SPARSE, {"id": "rice"}, {"id": "chunk_top_k", "chunk": 64, "kept": 5}],
            "rice and chunk_top_k do not go together",
        ),
        ([SPARSE, {"id": "error_feedback", "inner": [{"id": "qsgd"}]}], "top_k and qsgd do not go together"),
        ([{"id": "float32"}] * 16, "it has 17 stages; 16 are the most"),
    ],
)
@pytest.mark.parametrize("where", ["codec", "downlink.codec"])
def test_stages_that_lose_what_others_made_are_refused_by_name(stages: list[Any], said: str, where: str) -> None:
    bad = [*stages, PACK]
    run = spec(codec=bad) if where == "codec" else spec(downlink={"codec": bad})
    with pytest.raises(SpecError, match="^" + re.escape(f"{where}: {said}")):
        check_codecs(run)


def _forgetful(*_: Any) -> Any:
    raise KeyError("scales")


def test_what_is_raised_within_a_chain_is_a_fault_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.codecs.floats.Float16.decode", _forgetful)
    trial._fault.cache_clear()
    with pytest.raises(
        SpecError, match=re.escape("codec: chain(float16, pack) cannot code an update: KeyError: 'scales'")
    ):
        trial.check(chain.codec("float16"), 1.0, "codec")
    trial._fault.cache_clear()


def test_a_trial_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    trial.check(chain.codec("ecsq"), 1.0, "codec")
    monkeypatch.setattr(trial, "_clash", lambda _: pytest.fail("tried again"))
    trial.check(chain.codec("ecsq"), 1.0, "downlink.codec")


@pytest.mark.parametrize("before", [[TURN], [{"id": "balance"}], [{"id": "balance"}, TURN]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_turned_and_then_sent_as_it_is_can_be_folded(before: list[Any], wrapped: bool) -> None:
    codec = chain.codec(
        [{"id": "error_feedback", "inner": before} if wrapped else before[0], *before[1:][: not wrapped], PACK]
    )
    values = np.linspace(-0.5, 0.5, trial.LAYOUT.size, dtype=np.float32)
    payload, _ = codec.encode(Delta(trial.LAYOUT, values), codec.init(trial.LAYOUT))
    total = FixedPointSum(trial.LAYOUT)
    if not total.add_coded(codec, memoryview(payload), trial.LAYOUT, 3):
        total.add(codec.decode(payload, trial.LAYOUT).vector, 3)
    np.testing.assert_allclose(total.mean(), values, atol=1e-6)


def test_bits_beyond_what_a_codec_can_be_asked_for_are_refused_with_the_rounds_share() -> None:
    most = [{"id": "ecsq", "target_bits": 12.0}, PACK]
    rated = {"codec": most, "downlink": {"codec": most}}
    with pytest.raises(SpecError, match=r"rates: with this growth codec has 3.6 times 12 bits a parameter in round 4"):
        check_codecs(spec(**rated, rates={"growth": 1000.0}))
    with pytest.raises(SpecError, match="in round 1, and 12 are the most"):
        check_codecs(spec(**rated, rates={"growth": 0.01}))
    check_codecs(spec(**rated, rates={"growth": 1.0}))


def test_a_target_of_bytes_has_no_most() -> None:
    by_bytes = [{"id": "ecsq", "target_bits": 12.0, "target_bytes": 200}, PACK]
    check_codecs(spec(codec=by_bytes, rates={"growth": 1000.0}))
