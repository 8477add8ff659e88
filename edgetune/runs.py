"""`edgetune run`: create runs, look at them, check them, take their result home."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from coordinator.rules import Rules, check_codecs
from edge_client import bases, starts
from edge_client.adapters import Adapter, Base
from edge_client.adapters.low_rank import PREFIX
from edge_client.banks import initial_of, layout_of, names_of, of_domain
from edge_client.releases import Releases, digest_of
from edge_client.session import methods, settled, view_of
from edge_client.starts import Source
from edge_client.taken import shared_alone
from edge_client.transport import Connection
from edge_client.typed import release_number
from edgetune import devices, standing
from wire import prng, run_spec, spec
from wire.codecs.compositions import COMPOSITIONS
from wire.delta import Layout, Vector
from wire.errors import MissingExtra, UserError
from wire.identity import read_card
from wire.messages import Control, ReleaseStatus, RunStatus
from wire.prng import Combine
from wire.run_spec import RunSpec

CONTROLS: dict[Control, str] = {
    "pause": "hand out no more tasks; deadlines stand still, updates under way still count",
    "resume": "go on with a paused run",
    "stop": "end a run with its newest release",
}
EXAMPLES = """\
examples:
  edgetune run create speeches.toml
  edgetune run create speeches.toml --codec rotated_ecsq --downlink-codec rotated_ecsq
  edgetune run create second-stage.toml --start-from speeches
  edgetune run list
  edgetune run watch speeches
  edgetune run pause speeches --reason "new data on Monday"
  edgetune run resume speeches
  edgetune run verify speeches --store /srv/edgetune
  edgetune run replay speeches --backend numba
  edgetune run export speeches --to peft ./speeches-adapter

a spec to start from:
  name = "speeches"
  rounds = 4
  [base]
  model = "smollm2-135m"
  format = "nf4"
  [cohort]
  goal = 3
  [method]
  id = "lora"
  local_steps = 8
  [downlink]               # releases as coded deltas; without it as float32 adapters
  codec = "ecsq"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from coordinator.cli import store_arguments

    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = _action(commands, "create", "open a run from a TOML spec")
    create.add_argument("spec", type=Path, metavar="SPEC.toml")
    create.add_argument(
        "--base", type=Path, metavar="DIR", help="the quantized base, if not built from the spec's model"
    )
    create.add_argument("--codec", choices=sorted(COMPOSITIONS), help="of updates, instead of the spec's")
    create.add_argument(
        "--downlink-codec", choices=sorted(COMPOSITIONS), help="of releases, instead of the spec's or of whole adapters"
    )
    create.add_argument(
        "--start-from",
        metavar="RUN[@VERSION]|DIR",
        help="begin with another run's release, or a peft folder of the same base, and not with the base alone",
    )
    _action(commands, "list", "every run of a coordinator")
    _action(commands, "status", "one run").add_argument("run", metavar="RUN")
    _action(commands, "watch", "one run, live, until it ends").add_argument("run", metavar="RUN")
    for action, summary in CONTROLS.items():
        control = _action(commands, action, summary)
        control.add_argument("run", metavar="RUN")
        control.add_argument("--reason", default="", metavar="TEXT", help="one line, shown by `edgetune run status`")
    verify = _action(commands, "verify", "compute every release again from the stored updates")
    verify.add_argument("run", metavar="RUN")
    store_arguments(verify)
    replay = _action(commands, "replay", "build a scalar run's adapter from its history; its SHA-256")
    replay.add_argument("run", metavar="RUN")
    replay.add_argument("--release", type=release_number, metavar="VERSION", help="default: the newest")
    replay.add_argument(
        "--backend", choices=["numpy", "numba", "torch", "cuda", "mps"], default="numpy", help="default: %(default)s"
    )
    export = _action(commands, "export", "write a run's adapter or merged model to a folder")
    export.add_argument("run", metavar="RUN")
    export.add_argument("out", type=Path, metavar="DIR")
    export.add_argument(
        "--to",
        choices=["peft", "merged", "torch"],
        required=True,
        help="an adapter folder, a whole model, or (bottleneck adapters) a folder with a loader of its own",
    )
    export.add_argument("--domain", metavar="NAME", help="which of the run's adapters, where it has banks")
    export.add_argument("--onto", type=Path, metavar="DIR", help="the whole model, for a run that tuned its emulator")
    export.add_argument("--release", type=release_number, metavar="VERSION", help="default: the newest")
    export.add_argument(
        "--base", type=Path, metavar="DIR", help="the quantized base, if not built from the spec's model"
    )


def _action(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices.administrator_arguments(parser)
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    return parser


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "create": _create,
        "list": _list,
        "status": _status,
        "watch": _watch,
        "verify": _verify,
        "export": _export,
        "replay": _replay,
        **dict.fromkeys(CONTROLS, _control),
    }
    return actions[args.action](args)


def create(
    connection: Connection, wanted: RunSpec, folder: Path | None = None, start_from: str | None = None
) -> RunStatus:
    """Open a run: find its base, let its method lay out and initialise the adapter, or `start_from` another one, and upload both
    names and numbers.

    Raises SpecError for a method that is not in its table and a codec that cannot work, BaseModelError for a base of another
    digest, UserError for an adapter that the run cannot start from.
    """
    check_codecs(wanted)  # before minutes are spent on a base
    base = bases.find(wanted.base, folder)
    named, adapter = settled(dataclasses.replace(wanted, base=_named(wanted, base, folder)), base)
    layout, initial = layout_of(named, adapter, base), initial_of(named, adapter, base)
    if start_from is not None:
        one = _begun(_source(connection, start_from, adapter, base), named, adapter, base, adapter.layout(base))
        initial = np.tile(one, layout.size // one.size)  # every bank begins there
        named = dataclasses.replace(named, start=digest_of(initial))
    Rules.of(named, layout)  # what the coordinator would refuse is a mistake in the spec: say so as one
    return connection.create_run(named, layout, initial)


def _source(connection: Connection, named: str, adapter: Adapter, base: Base) -> Source:
    """A folder, or a release of this coordinator. Raises UserError for one that is of another base."""
    if Path(named).is_dir():
        return starts.of_folder(Path(named), base)
    found = re.fullmatch(r"([^@/]+)(?:@(\d{1,9}))?", named)
    if found is None:
        raise UserError(f"--start-from {named}: no such folder, and no RUN or RUN@VERSION")
    described, layout = connection.describe(found[1])
    if described.base.digest != base.identity:
        theirs = f"{described.base.digest[:12]}… ({described.base.model}, {described.base.format})"
        raise UserError(f"--start-from {named}: it tunes base {theirs}, and this run {base.identity[:12]}…")
    if several := names_of(described):
        raise UserError(f"--start-from {named}: it has the banks {', '.join(several)}; export one, and give its folder")
    row = methods(described)[0].tunes()
    first, version = row.initial(layout, described.seed, base), None if found[2] is None else int(found[2])
    held = Releases().fetch(connection, described, layout, first, version)
    return starts.of_release(named, row if row == adapter else shared_alone(row, base), base, held.trajectory.adapter)


def _begun(source: Source, named: RunSpec, adapter: Adapter, base: Base, layout: Layout) -> Vector:
    initial, lost = starts.begun(source, adapter, base, layout, named.seed)
    if lost > 1e-3:
        Console(stderr=True).print(
            f"{source.named}: {100 * lost:.1f} % of what it changed does not fit into this run's rank", highlight=False
        )
    return initial


def _named(wanted: RunSpec, base: Base, folder: Path | None) -> run_spec.BaseRef:
    """The base as every device will see it: by digest, and never by a path of this machine."""
    local = folder is not None or Path(wanted.base.model).exists()
    model = Path(wanted.base.model).name if local else wanted.base.model
    return dataclasses.replace(wanted.base, model=model, digest=base.identity)


def _create(args: argparse.Namespace) -> int:
    wanted = run_spec.recoded(run_spec.read_toml(args.spec), args.codec, args.downlink_codec)
    with devices.connection(args) as connection:
        connection.runs()  # is there a coordinator? asked before minutes are spent on building a base
        with run_spec.of_file(args.spec):
            status = create(connection, wanted, args.base, args.start_from)
    if args.json:
        shown = {"run": status.name, "digest": status.spec_digest, "parameters": status.parameters}
        print(json.dumps({**shown, "base": status.base_digest, "rounds": status.rounds}))
    else:
        print(
            f"run {status.name}: {status.rounds} rounds, {status.parameters:,} parameters, base {status.base_digest[:12]}…"
        )
        print(
            f"devices join with: edgetune client join --coordinator {args.coordinator} --run {status.name} --data FILE"
        )
    return 0


def _list(args: argparse.Namespace) -> int:
    with devices.connection(args) as connection:
        statuses = connection.runs()
    if args.json:
        print(json.dumps([spec.plain(status) for status in statuses]))
        return 0
    for status in statuses:
        print(standing.line(status))
    if not statuses:
        print("no runs; `edgetune run create SPEC.toml` opens one")
    return 0


def _status(args: argparse.Namespace) -> int:
    with devices.connection(args) as connection:
        status = connection.status(args.run)
    if args.json:
        print(json.dumps(spec.plain(status)))
    else:
        Console().print(standing.text(status), highlight=False)
    return 0


def _control(args: argparse.Namespace) -> int:
    with devices.connection(args) as connection:
        status = connection.control(args.run, args.action, args.reason)
    print(json.dumps(spec.plain(status)) if args.json else standing.line(status))
    return 0


def _watch(args: argparse.Namespace) -> int:
    with devices.connection(args) as connection:
        statuses = connection.watch(args.run)
        last = _as_json(statuses) if args.json else standing.watch(statuses)
    return 0 if last is not None and last.state in ("done", "stopped") else 1


def _as_json(statuses: Iterable[RunStatus]) -> RunStatus | None:
    """A line a status, with the releases that are new or have changed since the line before; the last."""
    last, shown = None, frozenset[ReleaseStatus]()
    for last in statuses:
        fresh = tuple(release for release in last.releases if release not in shown)
        print(json.dumps(spec.plain(dataclasses.replace(last, releases=fresh))), flush=True)
        shown = frozenset(last.releases)
    return last


def _verify(args: argparse.Namespace) -> int:
    from coordinator.cli import identity_folder, place
    from coordinator.verify import Checked, verify

    admin = identity_folder(args)
    card = read_card(admin / "admin") or read_card(admin)
    if args.identity is not None and card is None:
        raise UserError(f"{args.identity}: no identity here, and so no key to check signatures with")

    async def check() -> list[Checked]:
        store = place(args).open(create=False)
        try:
            return await verify(store, args.run, card.release_key if card else None)
        finally:
            await store.ledger.close()

    started = time.monotonic()
    verdicts = asyncio.run(check())
    good = all(v.fault is None for v in verdicts)
    if args.json:
        shown = {"run": args.run, "verified": good, "signed": all(v.signed for v in verdicts)}
        print(json.dumps(shown | {"releases": [dataclasses.asdict(v) for v in verdicts]}))
    else:
        for v in verdicts:
            print(f"release {v.version}  {v.digest}  {v.contributions} updates  {v.sentence}")
        if not any(v.signed for v in verdicts):
            print("signatures: none checked; a coordinator without identities signs nothing")
        print(
            f"{'verified' if good else 'NOT verified'}: {len(verdicts)} releases in {time.monotonic() - started:.1f} s"
        )
    return 0 if good else 1


def _export(args: argparse.Namespace) -> int:
    from edge_client import export

    with devices.connection(args) as connection:
        described, layout = connection.describe(args.run)
        base, row = bases.find(described.base, args.base), methods(described)[0].tunes()
        held = Releases().fetch(connection, described, layout, initial_of(described, row, base), args.release)
    alone = shared_alone(row, base)
    release = held.release
    view = of_domain(described, view_of(described, alone, base, None), args.domain)
    layout, vector = view.layout, view.enter(held.trajectory, held.trajectory.adapter[:0]).adapter
    write = {"peft": export.to_peft, "merged": export.to_merged, "torch": export.to_torch}[args.to]
    base, layout = (base, layout) if args.onto is None else _onto(base, alone, layout, args.onto)
    write(base, alone.placement(base), layout, vector, args.out)
    shown = {"run": args.run, "release": release.version, "digest": release.digest, "to": args.to, "out": str(args.out)}
    lacking = (
        "" if alone == row else "; what each device has of its own is not in it: `edgetune client export` writes that"
    )
    print(json.dumps(shown) if args.json else f"release {release.version} of {args.run} written to {args.out}{lacking}")
    return 0


def _onto(emulator: Base, row: Adapter, layout: Layout, folder: Path) -> tuple[Base, Layout]:
    """The whole model in `folder` in the place of its emulator, and the layout that the same vector has there.

    Raises UserError where the adapter stands on layers that are not the whole model's own last ones.
    """
    from quantize import open_base
    from quantize.emulator import original

    kept = getattr(emulator, "kept_layers", None)
    if kept is None:
        raise UserError("--onto: this run's base is no emulator: it has all of its layers")
    whole = open_base(folder)
    there = row.layout(whole)
    names = [original(tensor.name.removeprefix(PREFIX), kept) for tensor in layout.tensors]
    if names != [tensor.name.removeprefix(PREFIX) for tensor in there.tensors]:
        raise UserError(
            f"--onto: the adapter stands on other layers of {folder} than of its emulator: tune the last `layers`"
        )
    return whole, there


def _replay(args: argparse.Namespace) -> int:
    """Every backend walks the same way: the digest it prints is the same."""
    with devices.connection(args) as connection:
        described, layout = connection.describe(args.run)
        if described.codec is not None:
            raise UserError(
                f"run {args.run!r} takes deltas: its releases are stored adapters, there is nothing to replay"
            )
        initial = methods(described)[0].tunes().initial(layout, described.seed)
        started = time.monotonic()
        held = Releases(_combine(args.backend)).fetch(connection, described, layout, initial, args.release)
    digest = spec.bytes_digest(memoryview(held.trajectory.adapter.astype("<f4").data).cast("B"))
    shown = {"run": args.run, "release": held.release.version, "adapter": digest, "backend": args.backend}
    seconds = round(time.monotonic() - started, 3)
    text = f"release {held.release.version} of {args.run}: adapter {digest}, {held.bytes:,} bytes, {seconds} s"
    print(json.dumps(shown | {"bytes": held.bytes, "seconds": seconds}) if args.json else text)
    return 0


def _combine(backend: str) -> Combine:
    if backend == "numpy":
        return prng.combine_numpy
    if importlib.util.find_spec("numba" if backend == "numba" else "torch") is None:
        raise MissingExtra("numba" if backend == "numba" else "torch", "fast" if backend == "numba" else "torch")
    if backend == "numba":
        return prng.combine_numba
    from edge_client.engines import torch_directions

    if not torch_directions.available("cpu" if backend == "torch" else backend):
        raise UserError(f"--backend {backend}: torch finds no such device here; take numpy, numba or torch")
    return functools.partial(torch_directions.combine, device="cpu" if backend == "torch" else backend)
