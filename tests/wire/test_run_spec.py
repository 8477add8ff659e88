from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.rules import Rules
from edge_client.banks import layout_of
from edge_client.engines.toy import ToyBase
from edge_client.methods import METHODS
from edge_client.session import settled
from wire import run_spec, spec
from wire.errors import SpecError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
LEAST: dict[str, Any] = {
    "name": "run",
    "base": {"model": "toy", "format": "toy"},
    "rounds": 1,
    "cohort": {"goal": 2},
    "method": {"id": "lora"},
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_describes_a_run_that_both_ends_understand(path: Path) -> None:
    run = run_spec.read_toml(path)
    spec.build(METHODS, run.method, "method")
    Rules.of(run, layout_of(run, spec.build(METHODS, {"id": "lora"}).tunes(), ToyBase()))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_a_spec_survives_its_plain_form_and_its_digest_tells_every_change() -> None:
    run = run_spec.parse(LEAST)
    assert run_spec.parse(spec.plain(run)) == run
    assert run_spec.parse(LEAST | {"seed": 1}).digest != run.digest


def test_the_digest_of_a_run_is_for_ever_whatever_fields_are_added() -> None:
    assert run_spec.parse(LEAST).digest[:16] == "e19d6f5305632e7f"
    assert run_spec.parse(LEAST | {"cohort": {"goal": 1, "owner_share": 0.5}}).digest[:16] != "e19d6f5305632e7f"


def test_a_codec_by_name_is_frozen_as_its_stages() -> None:
    named = run_spec.parse(LEAST | {"codec": "int4"})
    assert named.codec is not None
    assert named.codec[0] == {
        "id": "error_feedback",
        "inner": [{"id": "blockwise", "bits": 4, "block": 64}],
        "decay": 1.0,
    }


def test_a_codec_given_beside_a_spec_takes_the_place_of_its_own_and_leaves_all_else() -> None:
    plain, decaying = run_spec.parse(LEAST), {"codec": "int8", "decay": 0.5}
    coded = run_spec.parse(LEAST | {"downlink": decaying})
    assert run_spec.recoded(coded) == coded
    assert run_spec.recoded(coded, "int4") == run_spec.parse(LEAST | {"codec": "int4", "downlink": decaying})
    assert run_spec.recoded(coded, downlink="ecsq") == run_spec.parse(
        LEAST | {"downlink": decaying | {"codec": "ecsq"}}
    )
    assert run_spec.recoded(plain, downlink="ecsq") == run_spec.parse(LEAST | {"downlink": {"codec": "ecsq"}})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "Not A Name"}, "name must be"),
        ({"rounds": 0}, "rounds must lie"),
        ({"rounds": "3"}, "run spec.rounds: expected a whole number"),
        ({"rounds": True}, "a whole number"),
        ({"cohort": {"goal": 2, "minimum": 3}}, "minimum <= goal"),
        ({"cohort": {"goal": 2, "over_selection": 0.5}}, "over_selection"),
        ({"cohort": {"goal": 2, "deadline_s": float("inf")}}, "a finite number"),
        ({"cohort": {"goal": 2, "owner_share": 0.0}}, "owner_share"),
        ({"cohort": {"goal": 2, "owner_share": 1.1}}, "owner_share"),
        ({"cohort": {}}, "missing key 'goal'"),
        ({"codec": "int2"}, "unknown name 'int2'"),
        ({"codec": 5}, "run spec.codec: expected a list or a str, got 5"),
        ({"codec": ["int4"]}, r"run spec.codec\[0\]: expected a table, got 'int4'"),
        ({"codec": [{"id": "os.system"}]}, "unknown id 'os.system'"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"evaluation": {"fraction": 0}}, "fraction"),
        ({"base": {"model": "toy", "format": "toy", "digest": "abc"}}, "64 hexadecimal"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_by_what_is_wrong_with_it(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        run_spec.parse(LEAST | changed)


WHOLE = b"""
name = "r"
rounds = 1
[base]
model = "toy"
format = "toy"
[method]
id = "lora"
"""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"name = ", "not TOML"),
        (b"\xff", "cannot be read"),
        (b"", "missing key"),
        (WHOLE + b'[cohort]\ngoal = "many"', "goal"),
        (b'codec = [{ id = "nope" }]\n' + WHOLE + b"[cohort]\ngoal = 1", "nope"),
    ],
)
def test_a_spec_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=said) as caught:
        run_spec.read_toml(path)
    assert "run.toml" in str(caught.value)


def test_a_run_in_rounds_keeps_the_name_it_had_before_there_were_buffers() -> None:
    assert run_spec.parse(LEAST).digest == "e19d6f5305632e7fda2134d437e0cf472fb7661757dcbfd8601a3be244486d0f"


ASYNC = {"mode": "async", "buffer": 4, "max_staleness": 2}


@pytest.mark.parametrize(
    ("cohort", "said"),
    [
        ({"mode": "async", "buffer": 4}, "needs buffer and max_staleness"),
        (ASYNC | {"goal": 4}, "has no goal"),
        ({"goal": 4, "buffer": 4}, 'need mode = "async"'),
        ({"mode": "sync"}, "missing key 'goal'"),
        (ASYNC | {"minimum": 5}, "minimum <= buffer"),
        (ASYNC | {"max_staleness": -1}, "max_staleness must lie"),
        ({"mode": "later"}, "'sync' or 'async'"),
    ],
)
def test_a_buffered_cohort_that_cannot_be_is_refused_by_what_is_wrong_with_it(cohort: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        run_spec.parse(LEAST | {"cohort": cohort})


@pytest.mark.parametrize(
    ("method", "good"), [("lora", True), ("mezo", True), ("decomfl", False), ("hiso", False), ("kseed", False)]
)
def test_only_updates_that_mean_something_in_a_later_release_may_be_buffered(method: str, good: bool) -> None:
    adapter = {"id": "lora", "rank": 2, "tuned": "B"}
    wanted = run_spec.parse(LEAST | {"cohort": ASYNC, "method": {"id": method, "adapter": adapter}})
    if good:
        assert settled(wanted, ToyBase())[0].cohort.size == 4
    else:
        with pytest.raises(SpecError, match="async"):
            settled(wanted, ToyBase())


def test_scalars_are_buffered_along_a_subspace_only_if_it_is_the_same_in_every_release() -> None:
    def wanted(refresh: int) -> run_spec.RunSpec:
        subspace = {"structure": "subzero", "rank": 2, "refresh": refresh}
        method = {"id": "mezo", "adapter": {"id": "lora", "rank": 2, "tuned": "B"}, "subspace": subspace}
        return run_spec.parse(LEAST | {"cohort": ASYNC, "method": method})

    assert settled(wanted(0), ToyBase())[0].cohort.size == 4
    with pytest.raises(SpecError, match="refresh = 0"):
        settled(wanted(3), ToyBase())


@pytest.mark.parametrize(("growth", "rounds"), [(8.0, 10), (1.0, 3), (0.5, 7), (8.0, 1)])
def test_the_shares_of_a_runs_rounds_grow_evenly_and_have_the_mean_one(growth: float, rounds: int) -> None:
    shares = [run_spec.Rates(growth).share(number, rounds) for number in range(1, rounds + 1)]
    assert sum(shares) / rounds == pytest.approx(1)
    assert shares[-1] / shares[0] == pytest.approx(growth if rounds > 1 else 1)


OLD = (
    '{"aggregator":{"id":"mean","weight_by":"examples"},"base":{"digest":"'
    + "b" * 64
    + '","format":"toy","model":"toy"},'
    '"codec":[{"id":"float32"},{"id":"pack"}],"cohort":{"deadline_s":3600.0,"goal":2,"max_attempts":20,"minimum":1,'
    '"over_selection":1.0},"directions":null,"evaluation":{"fraction":0.2,"max_sequences":16},"forward_method":null,'
    '"method":{"id":"lora","rank":4},"name":"r","rounds":3,"seed":0,"server_optimizer":{"id":"average"}}'
)
"""A description as a coordinator gave it before there were editions."""


def test_a_description_of_an_old_coordinator_is_the_run_that_it_was() -> None:
    run = run_spec.parse(json.loads(OLD))
    assert run.digest == "368db34e06fb9387a5bc3d4463313f3a32b1b258d09206c56c55a6d8a77616ed"
    assert run.edition == 1


def test_what_is_not_set_is_not_said_so_that_an_older_program_meets_no_key_that_it_does_not_know() -> None:
    said = json.loads(spec.canonical(run_spec.parse(json.loads(OLD))))
    assert set(said) <= set(json.loads(OLD)) and set(said["cohort"]) == set(json.loads(OLD)["cohort"])


@pytest.mark.parametrize(
    ("changed", "edition"),
    [
        ({}, 1),
        ({"method": {"id": "mezo", "adapter": {"id": "norms"}}, "directions": {"drawn": "device"}}, 1),
        ({"codec": [{"id": "error_feedback", "inner": [{"id": "float16"}]}, {"id": "pack"}]}, 1),
        ({"cohort": {"goal": 2, "owner_share": 0.5}}, 2),
        ({"cohort": ASYNC}, 2),
        ({"method": {"id": "hybrid"}}, 2),
        ({"aggregator": {"id": "flexlora"}}, 2),
        ({"forward_method": {"id": "mezo", "adapter": {"id": "of tomorrow"}}}, 2),
        ({"directions": {"drawn": "device", "subspace": {"rank": 2}}}, 2),
    ],
)
def test_a_run_needs_the_earliest_edition_that_can_say_it(changed: dict[str, Any], edition: int) -> None:
    table = LEAST | changed
    codec = table.pop("codec", "float32")
    run = run_spec.parse(table | {"codec": "float32"})
    assert dataclasses.replace(run, codec=codec).edition == edition
