from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import doctor, session
from edge_client.adapters import whole_layout
from edge_client.engines import torch_memory
from edge_client.engines.toy import ToyBase
from edge_client.methods.lora import Lora
from edge_client.ranks import affordable_rank, rank_here
from edge_client.state import DeviceState, tuned_rank
from edge_client.taken import Taken, taken
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import tiny_llama
from wire import run_spec
from wire.errors import UserError
from wire.scalars import Directions, Trajectory

METHOD: Any = Lora(rank=16, batch=2, sequence_length=32)
RUN = run_spec.parse(
    {
        "name": "r",
        "base": {"model": "tiny", "format": "nf4"},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": {"id": "lora", "rank": 16, "batch": 2, "sequence_length": 32},
        "portions": {"id": "tuned", "least_rank": 4},
    }
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder: Path = tmp_path_factory.mktemp("models")
    return build(str(tiny_llama(folder / "model")), "nf4", folder / "nf4")


def needed(base: QuantizedBase, rank: int) -> int:
    """Bytes of the smallest plan at `rank`: what the planner says is the least."""
    size = whole_layout(METHOD.tunes().narrowed(rank), base).size
    config, fixed = doctor._config(base), torch_memory.resident(base)
    kept = torch_memory.plan(config, fixed, size, 1, 32, None).expected
    again = torch_memory._per_token(config, True, 2) - torch_memory._per_token(config, False, 2)
    return kept + min(0, 32 * again)


def test_the_rank_is_the_largest_that_fits_and_never_below_the_runs_least(base: QuantizedBase) -> None:
    for rank in (5, 9, 15):
        assert affordable_rank(RUN, METHOD, base, needed(base, rank)) == rank
        assert affordable_rank(RUN, METHOD, base, needed(base, rank) - 1) == max(4, rank - 1)
    assert affordable_rank(RUN, METHOD, base, needed(base, 4) - 1) == 4
    assert rank_here(RUN, METHOD, base, None, 4 << 30) is None


def test_what_the_person_says_goes_first_and_one_rank_for_all_stays_one(base: QuantizedBase) -> None:
    assert rank_here(RUN, METHOD, base, 6, needed(base, 9)) == 6
    assert affordable_rank(RUN, METHOD, base, None) is None
    assert affordable_rank(dataclasses.replace(RUN, portions=None), METHOD, base, needed(base, 9)) is None


def test_doctor_says_the_rank_that_fits(base: QuantizedBase) -> None:
    run = dataclasses.replace(RUN, base=dataclasses.replace(RUN.base, digest=base.identity))
    report = doctor.examine(run, "torch", base.folder, needed(base, 9), 1, measure=False)
    assert report.picked is not None and report.picked.rank == 9
    assert "at rank 9, the largest that fits here" in doctor.text(report)


MIXED = run_spec.parse(
    {
        "name": "mixed",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": {"id": "lora", "rank": 4},
        "portions": {"id": "tuned", "least_rank": 1},
    }
)


def at_home(folder: Path, rank: int | None = None) -> Taken:
    row = session.methods(MIXED)[0].tunes()
    layout = row.layout(ToyBase())
    release = Trajectory.start(Directions(), layout, row.initial(layout, 0, ToyBase()))
    return taken(MIXED, row, ToyBase(), release, folder, rank)


def test_a_device_takes_home_what_it_computes_with_at_the_rank_at_which_it_took_part(tmp_path: Path) -> None:
    full = at_home(tmp_path)
    state = DeviceState(tmp_path, "d")
    state.tunes(MIXED, 2)
    kept = at_home(tmp_path)  # while a client is at work
    assert (full.layout.size, kept.layout.size) == (4 * 512, 2 * 512)
    assert np.array_equal(kept.vector, at_home(tmp_path, 2).vector)
    assert at_home(tmp_path, 4).layout == full.layout and at_home(tmp_path, 1).layout.size == 512
    assert tuned_rank(tmp_path, dataclasses.replace(MIXED, seed=1)) is None
    state.tunes(MIXED, None)
    state.close()
    assert at_home(tmp_path).layout == full.layout


def test_a_rank_beyond_the_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rank 5: run 'mixed' has rank 4"):
        at_home(tmp_path, 5)
