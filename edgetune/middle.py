"""`edgetune middle`: a split-learning helper, which computes a model's middle layers for devices that hold its ends."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from coordinator.authority import Authority
from edge_client import bases
from edge_client.middle import packed, unpacked
from protos.v1 import middle_pb2 as pb
from protos.v1 import middle_pb2_grpc as pb_grpc
from wire import addresses
from wire.errors import EdgetuneError, IdentityError, MachineError, UserError
from wire.identity import is_loopback
from wire.run_spec import BaseRef

EXAMPLES = """\
examples:
  edgetune middle --layers 2:26                                      on loopback, for clients of this machine
  edgetune middle --layers 2:26 --listen 0.0.0.0:7450 --identities authority
  edgetune client join --data notes.jsonl --engine split --middle 127.0.0.1:7450

It keeps nothing between calls. It sees hidden states, from which text can be found again: run it where the text may be seen.
With --identities only devices with a certificate of that authority may call; one that was revoked may, until it expires.
"""
OPTIONS = [("grpc.max_receive_message_length", 256 << 20), ("grpc.max_send_message_length", 256 << 20)]
WORKERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", required=True, metavar="FIRST:LAST", help="from FIRST up to, and without, LAST")
    parser.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--format", default="nf4", metavar="FORMAT", help="of the base; default: %(default)s")
    parser.add_argument("--base", type=Path, metavar="DIR", help="a quantized base made by `edgetune quantize`")
    parser.add_argument("--listen", default="127.0.0.1:7450", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--identities", type=Path, metavar="DIR", help="the folder of `edgetune coordinator init`")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine without identities")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    import torch

    from edge_client.engines.middle_layers import MiddleLayers

    first, last = _layers(args.layers)
    credentials = _credentials(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    layers = MiddleLayers(bases.find(BaseRef(args.model, args.format), args.base), first, last)  # type: ignore[arg-type]  # the toy base has no layers, and is refused there
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    servicer = Servicer(layers)
    with ThreadPoolExecutor(WORKERS) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0), *OPTIONS])
        pb_grpc.add_MiddleServicer_to_server(servicer, server)
        address = _bound(server, args.listen, credentials)
        server.start()
        _say(args.json, {"event": "listening", "address": address, "first": first, "last": last, "base": layers.base})
        stop.wait()
        server.stop(5.0).wait()
    _say(args.json, {"event": "stopped", **servicer.traffic})
    return 0


def _say(as_json: bool, told: dict[str, Any]) -> None:
    text = " ".join(f"{key} {value}" for key, value in told.items() if key != "event")
    print(json.dumps(told) if as_json else f"{told['event']}: {text}", flush=True)


def _layers(said: str) -> tuple[int, int]:
    first, _, last = said.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise UserError(f"--layers {said}: expected FIRST:LAST, such as 2:26")
    return int(first), int(last)


def _credentials(args: argparse.Namespace) -> grpc.ServerCredentials | None:
    """Raises IdentityError where calls would leave this machine and nobody would be asked who he is."""
    if args.identities is not None:
        authority = Authority(args.identities)
        key, certificate = (pem.encode() for pem in authority.server())
        return grpc.ssl_server_credentials(
            [(key, certificate)], authority.certificate.encode(), require_client_auth=True
        )
    if not is_loopback(args.listen) and not args.insecure:
        raise IdentityError(
            f"--listen {args.listen} is beyond this machine: name the coordinator's folder by --identities, or go without by"
            " --insecure"
        )
    return None


def _bound(server: grpc.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    host, _ = addresses.parse(listen)
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise MachineError(
            f"cannot listen on {listen}: the port is in use or the address is not this machine's"
        ) from error
    return addresses.joined(host, port)


class Servicer(pb_grpc.MiddleServicer):
    """`layers` is a `MiddleLayers`. What devices send is refused, by name, before anything is computed of it."""

    def __init__(self, layers: Any) -> None:
        self._layers, self._counting = layers, threading.Lock()
        self._calls = self._received = self._sent = 0

    @property
    def traffic(self) -> dict[str, int]:
        """Calls, and bytes of hidden states, since the start."""
        return {"calls": self._calls, "received": self._received, "sent": self._sent}

    def Describe(self, request: pb.MiddleRequest, context: grpc.ServicerContext) -> pb.MiddleLayers:
        self._check_base(request.base, context)
        return pb.MiddleLayers(base=self._layers.base, first=self._layers.first, last=self._layers.last)

    def Forward(self, request: pb.Hidden, context: grpc.ServicerContext) -> pb.Hidden:
        self._check_base(request.base, context)
        width = self._layers.width
        return self._answered(context, [request], lambda: self._layers.forward(unpacked(request, width), request.exact))

    def Backward(self, request: pb.HiddenGradient, context: grpc.ServicerContext) -> pb.Hidden:
        self._check_base(request.entered.base, context)
        width, both = self._layers.width, (request.entered, request.by_left)

        def computed() -> Any:
            entered, by_left = (unpacked(part, width) for part in both)
            if entered.shape != by_left.shape:
                raise ValueError("a gradient of another shape than what entered")
            return self._layers.backward(entered, by_left)

        return self._answered(context, both, computed)

    def _answered(self, context: grpc.ServicerContext, came: Any, compute: Callable[[], Any]) -> pb.Hidden:
        try:
            answer = packed(compute(), self._layers.base, False)
        except (EdgetuneError, ValueError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        with self._counting:
            self._calls += 1
            self._received += sum(len(part.values) for part in came)
            self._sent += len(answer.values)
        return answer

    def _check_base(self, base: str, context: grpc.ServicerContext) -> None:
        if base != self._layers.base:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this helper computes on base {self._layers.base[:12]}…, not on {base[:12]}…",
            )
