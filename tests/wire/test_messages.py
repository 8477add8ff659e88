from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from protos.v1 import federation_pb2 as pb
from wire.delta import Delta, Layout, Tensor
from wire.errors import PayloadError, Reason, SpecError
from wire.messages import Contribution, Metrics, Receipt, ReleaseManifest, RunStatus, Share, Task

TASK = Task("run", 3, 2, "evaluate", 2, "a" * 64, "b" * 64, "c" * 64, 12.5)
METRICS = Metrics(4.5, None, 100, 4.0, 2000, 8, 3.5, 1 << 30, 576_000, 9_768_960)
CONTRIBUTION = Contribution("d", "run", 3, 2, "e" * 64, 576_000, 40, "f" * 64, "a" * 64, METRICS)
MANIFEST = ReleaseManifest("run", 1, "b" * 64, "c" * 64, "a" * 64, "d" * 64, None, (Share("d", "e" * 64, 40),))


@pytest.mark.parametrize("message", [TASK, METRICS, CONTRIBUTION, Receipt("run", 3, 2, "d", "e" * 64)])
def test_a_message_survives_the_wire(message: Any) -> None:
    sent = message.to_proto()
    arrived = type(sent).FromString(sent.SerializeToString())
    assert type(message).from_proto(arrived) == message


def test_a_loss_of_zero_and_a_loss_that_was_not_measured_are_two_things() -> None:
    assert Metrics.from_proto(Metrics(loss_before=0.0).to_proto()).loss_before == 0.0
    assert Metrics.from_proto(Metrics().to_proto()).loss_before is None


def test_a_manifest_survives_and_its_digest_names_every_field() -> None:
    from wire import spec

    assert ReleaseManifest.parse(spec.canonical(MANIFEST)) == MANIFEST
    changed = [
        dataclasses.replace(MANIFEST, version=2),
        dataclasses.replace(MANIFEST, parent=None),
        dataclasses.replace(MANIFEST, contributions=(Share("d", "e" * 64, 41),)),
    ]
    assert len({m.digest for m in (MANIFEST, *changed)}) == 4


def test_the_digest_of_a_release_is_for_ever() -> None:
    assert MANIFEST.digest[:16] == "4fd53e217d9a422e"


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "../etc"},
        {"device": ""},
        {"run": "A B"},
        {"digest": "zz"},
        {"weight": 0},
        {"size": 0},
        {"digest": ""},
    ],
)
def test_a_contribution_that_no_device_of_ours_would_send_is_refused(wrong: dict[str, object]) -> None:
    sent = CONTRIBUTION.to_proto()
    for name, value in wrong.items():
        setattr(sent, name, value)
    with pytest.raises(PayloadError) as caught:
        Contribution.from_proto(sent)
    assert caught.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("name", ["loss_before", "train_loss", "train_seconds"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_that_are_not_finite_are_refused(name: str, value: float) -> None:
    sent = CONTRIBUTION.to_proto()
    setattr(sent.metrics, name, value)
    with pytest.raises(PayloadError):
        Contribution.from_proto(sent)


def test_a_weight_is_capped() -> None:
    sent = CONTRIBUTION.to_proto()
    sent.weight = 1 << 31
    assert Contribution.from_proto(sent).weight == 65_535


def test_a_task_of_a_later_kind_is_refused_by_an_older_client() -> None:
    with pytest.raises(PayloadError, match="older than the coordinator"):
        Task.from_proto(pb.Task(run="run"))


@pytest.mark.parametrize(
    "table",
    [
        {"tensors": []},
        {"tensors": [{"name": "a", "shape": []}]},
        {"tensors": [{"name": "a", "shape": [0]}]},
        {"tensors": [{"name": "a", "shape": [-1, -1]}]},
        {"tensors": [{"name": "a", "shape": [1 << 20, 1 << 20]}]},
        {"tensors": [{"name": "a", "shape": [2]}, {"name": "a", "shape": [2]}]},
        {"tensors": [{"name": "a", "shape": [2], "role": "x"}]},
        {"tensors": [{"name": "a", "shape": [2.5]}]},
        [],
        None,
    ],
)
def test_a_layout_that_cannot_be_is_refused(table: object) -> None:
    with pytest.raises(SpecError):
        Layout.parse(table)


def test_a_delta_has_the_size_and_dtype_of_its_layout() -> None:
    import numpy as np

    layout = Layout((Tensor("a", (2, 3)), Tensor("b", (4,))))
    with pytest.raises(ValueError, match="float32"):
        Delta(layout, np.zeros(10))  # type: ignore[arg-type]  # float64
    with pytest.raises(ValueError, match="float32"):
        Delta(layout, np.zeros(9, np.float32))
    parts = layout.split(np.arange(10, dtype=np.float32))
    assert parts["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parts["b"].tolist() == [6, 7, 8, 9]


def test_a_status_with_more_in_it_than_this_program_knows_is_read_all_the_same() -> None:
    told = {"name": "run", "state": "running", "round": 1, "rounds": 2, "attempt": 1, "kind": "train", "goal": 1}
    told |= {"minimum": 1, "offered": 0, "accepted": 0, "deadline_at": 0.0, "parameters": 4, "spec_digest": "a"}
    release = {"version": 0, "digest": "b", "contributions": 0, "published_at": 1.0, "held_out_loss": None}
    release |= {"held_out_tokens": 0, "local_loss": None, "train_loss": None, "bytes_up": 0, "bytes_down": 0}
    told |= {"base_digest": "b", "refused": {"BUSY": 1}, "releases": [release | {"colour": "red"}], "mood": {"good": 1}}
    read = RunStatus.from_proto(pb.RunStatus(status_json=json.dumps(told)))
    assert read.refused == {"BUSY": 1} and [one.version for one in read.releases] == [0]


def test_an_old_device_s_check_in_says_no_edition() -> None:
    sent = pb.CheckInRequest.FromString(bytes.fromhex("0a026431120172190000000000003e402001"))
    assert (sent.device, list(sent.runs), sent.wait_s, sent.protocol, sent.edition) == ("d1", ["r"], 30.0, 1, 0)
