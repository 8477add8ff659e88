"""Split learning: a device with the ends and a helper with the middle compute what one machine would, over real gRPC."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from coordinator import authority
from edge_client.adapters.low_rank import LoraFactors
from edge_client.adapters.prompts import PrefixKeys, SoftPrompt
from edge_client.engines import Optimizer, Tokens
from edge_client.engines.middle_layers import MiddleLayers
from edge_client.engines.split_engine import SplitEngine
from edge_client.engines.torch_engine import TorchEngine
from edge_client.identity import Identity
from edge_client.middle import Helper, packed, unpacked
from edgetune.cli import main
from edgetune.middle import Servicer
from protos.v1 import middle_pb2 as pb
from protos.v1 import middle_pb2_grpc as pb_grpc
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import HIDDEN, tiny_llama
from wire.errors import PayloadError, RemoteError, SpecError, UserError

FIRST, LAST = 1, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("split")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model", layers=4)), "bf16", folder / "base")


@pytest.fixture(scope="module")
def helper(base: QuantizedBase) -> Iterator[Helper]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        pb_grpc.add_MiddleServicer_to_server(Servicer(MiddleLayers(base, FIRST, LAST)), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield Helper(f"127.0.0.1:{port}")
        server.stop(None).wait()


def text() -> list[Tokens]:
    ids = np.random.Generator(np.random.Philox(key=5)).integers(0, 255, (4, 24)).astype(np.int32)
    return [Tokens(row, row.copy()) for row in ids]


def stepped(engine: TorchEngine, adapter: LoraFactors, steps: int = 3) -> tuple[list[float], np.ndarray]:
    engine.write(adapter.initial(engine.layout, 1))
    engine.start(Optimizer())
    return [engine.step(text(), 1e-2) for _ in range(steps)], engine.read()


ENDS = {"top": LoraFactors(rank=4, layers=1), "both": LoraFactors(rank=4, targets=tuple(
    f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 3) for x in "qv"))}  # fmt: skip


@pytest.mark.parametrize("ends", ENDS)
def test_losses_and_steps_are_those_of_one_machine_but_for_float16(
    base: QuantizedBase, helper: Helper, ends: str
) -> None:
    adapter = ENDS[ends]
    whole = TorchEngine.load(base, adapter, adapter.layout(base))
    split = SplitEngine.load(base, adapter, adapter.layout(base), helper=helper)
    assert split.loss(text())[0] == pytest.approx(whole.loss(text())[0], rel=1e-4)
    (losses, after), (wanted, as_whole) = stepped(split, adapter), stepped(whole, adapter)
    assert losses == pytest.approx(wanted, rel=2e-3) and losses[-1] < losses[0]
    moved, should = after - adapter.initial(split.layout, 1), as_whole - adapter.initial(split.layout, 1)
    assert moved @ should > 0.9 * np.linalg.norm(moved) * np.linalg.norm(should)


@pytest.mark.parametrize(("ends", "there", "back"), [("top", 1, 1), ("both", 3, 2)])
def test_what_a_step_moves_is_what_the_module_says(
    base: QuantizedBase, helper: Helper, ends: str, there: int, back: int
) -> None:
    adapter = ENDS[ends]
    engine = SplitEngine.load(base, adapter, adapter.layout(base), helper=helper)
    stepped(engine, adapter, steps=1)
    one = 2 * 4 * 24 * HIDDEN
    assert (engine.traffic["sent"], engine.traffic["received"]) == (there * one, back * one)


def test_an_adapter_on_the_helpers_layers_is_refused(base: QuantizedBase, helper: Helper) -> None:
    adapter = LoraFactors(rank=4)
    with pytest.raises(SpecError, match="tunes layer 1"):
        SplitEngine.load(base, adapter, adapter.layout(base), helper=helper)


def test_a_prefix_is_refused_and_a_prompt_is_tuned(base: QuantizedBase, helper: Helper) -> None:
    with pytest.raises(SpecError, match="prefix"):
        SplitEngine.load(base, PrefixKeys(length=2), PrefixKeys(length=2).layout(base), helper=helper)
    engine = SplitEngine.load(base, SoftPrompt(length=2), SoftPrompt(length=2).layout(base), helper=helper)
    engine.write(SoftPrompt(length=2).initial(engine.layout, 1, base))
    engine.start(Optimizer())
    losses = [engine.step(text(), 1e-2) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_without_a_helper_the_engine_says_what_it_needs(base: QuantizedBase) -> None:
    adapter = ENDS["top"]
    with pytest.raises(SpecError, match="--middle"):
        SplitEngine.load(base, adapter, adapter.layout(base))


@pytest.mark.parametrize("layers", [(0, 4), (3, 3), (2, 9)])
def test_layers_that_a_helper_cannot_have_are_refused(base: QuantizedBase, layers: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="--layers"):
        MiddleLayers(base, *layers)


def test_hidden_states_come_back_to_half_precision_whatever_their_size() -> None:
    hidden = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    for size in (1e-9, 1.0, 1e6):
        back = unpacked(packed(hidden * np.float32(size), "b", False), 8)
        np.testing.assert_allclose(back, hidden * np.float32(size), rtol=1e-3, atol=1e-6 * size)


@pytest.mark.parametrize(
    "bad", [{"values": b"12"}, {"batch": 1 << 30}, {"length": 0}, {"width": 9}, {"scale": float("nan")}]
)
def test_hidden_states_that_are_not_what_they_say_are_refused(bad: dict[str, object]) -> None:
    message = packed(np.ones((1, 2, 8), np.float32), "b", False)
    for key, value in bad.items():
        setattr(message, key, value)
    with pytest.raises(PayloadError):
        unpacked(message, 8)


def test_a_helper_of_another_base_and_garbage_are_refused_by_name(base: QuantizedBase, helper: Helper) -> None:
    with grpc.insecure_channel(helper.address) as channel:
        stub = pb_grpc.MiddleStub(channel)
        with pytest.raises(grpc.RpcError, match="not on cccccccccccc"):
            stub.Describe(pb.MiddleRequest(base="c" * 64))
        with pytest.raises(grpc.RpcError, match="another size"):
            stub.Forward(pb.Hidden(base=base.identity, batch=1, length=1, width=1, values=b"xx"))


def process(base: QuantizedBase, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "edgetune",
        "middle",
        "--base",
        str(base.folder),
        "--layers",
        f"{FIRST}:{LAST}",
        "--json",
    ]
    return subprocess.Popen(
        [*command, "--model", "tiny", "--format", "bf16", "--listen", "127.0.0.1:0", "--threads", "1", *more],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("identities", [False, True], ids=["in the clear", "over mutual TLS"])
def test_a_process_serves_says_what_it_did_and_ends(base: QuantizedBase, tmp_path: Path, identities: bool) -> None:
    folder = authority.create(tmp_path / "authority", ["localhost", "127.0.0.1"]).folder
    adapter = ENDS["top"]
    with process(base, *(["--identities", str(folder)] if identities else [])) as serving:
        assert serving.stdout is not None
        address = json.loads(serving.stdout.readline())["address"]
        if identities:
            with pytest.raises(RemoteError):
                SplitEngine.load(base, adapter, adapter.layout(base), helper=Helper(address))
        known = Identity.read(folder / "admin") if identities else None
        engine = SplitEngine.load(base, adapter, adapter.layout(base), helper=Helper(address, known))
        engine.loss(text())
        serving.send_signal(signal.SIGTERM)
        said = json.loads(serving.stdout.readline())
        assert serving.wait(30) == 0
    assert (said["event"], said["received"], said["sent"]) == (
        "stopped",
        engine.traffic["sent"],
        engine.traffic["received"],
    )


def test_beyond_this_machine_a_helper_wants_to_know_who_calls(base: QuantizedBase) -> None:
    command = ["middle", "--base", str(base.folder), "--layers", "1:3", "--listen", "0.0.0.0:0"]
    assert main([*command, "--model", "tiny", "--format", "bf16"]) == 2


def test_a_helper_that_is_not_there_is_said(base: QuantizedBase) -> None:
    adapter = ENDS["top"]
    with pytest.raises(RemoteError, match=r"helper at 127\.0\.0\.1:9"):
        SplitEngine.load(base, adapter, adapter.layout(base), helper=Helper("127.0.0.1:9"))
