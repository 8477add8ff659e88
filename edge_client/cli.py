"""`edgetune client`: join runs, look at this device, use what was tuned."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_client.typed import device_name, memory, positive, release_number
from wire import addresses
from wire.errors import UserError

if TYPE_CHECKING:
    from edge_client.adapters import Base
    from edge_client.calls import Tell
    from edge_client.middle import Helper
    from edge_client.taken import Taken
    from edge_client.transport import Connection
    from wire.run_spec import RunSpec

IDENTITY = "identity"
"""Within a device's state."""
DEFAULT_COORDINATOR = "127.0.0.1:7443"
EXAMPLES = """\
examples:
  edgetune client doctor
  edgetune client join --coordinator 192.0.2.7:7443 --data notes.jsonl
  edgetune client enroll edgetune://fl.example.org:7444/…
  edgetune client join --data chat.jsonl --run speeches --name laptop --max-memory 2G
  edgetune client join --data cases.jsonl --run offices --domain law
  edgetune client generate --run speeches "What news?"
  edgetune client export --run speeches --to peft mine
  edgetune client status

DATA is a file of JSON lines with `text`, or `messages`, or `instruction`/`input`/`output`. It never leaves the device.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _join_arguments(_action(commands, "join", "take part in runs until they have ended"))
    enroll = _action(commands, "enroll", "get an identity from a coordinator that invited this device")
    enroll.add_argument("invitation", metavar="INVITATION", help="what `edgetune coordinator invite` printed")
    _state_arguments(enroll)
    _state_arguments(_action(commands, "status", "what this device did so far"))
    leave = _action(commands, "leave", "give back an unfinished task and forget runs")
    _state_arguments(leave)
    _coordinator_argument(leave)
    leave.add_argument("--run", metavar="RUN", help="forget what is kept of this run, too")
    _generate_arguments(_action(commands, "generate", "answer a prompt with a run's newest adapter"))
    _export_arguments(_action(commands, "export", "take a run's adapter home, with what is this device's own"))
    _doctor_arguments(_action(commands, "doctor", "what this device can do and what would be picked"))


def _action(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="JSON on standard output, one object a line")
    return parser


def _coordinator_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator", type=addresses.called_at, metavar="HOST[:PORT]",
        help=f"default: the one enrolled with, else {DEFAULT_COORDINATOR}",
    )  # fmt: skip
    parser.add_argument(
        "--insecure", action="store_true", help="call without TLS and identity, even beyond this machine"
    )


def _state_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", type=device_name, metavar="NAME", help="this device's name (default: made up once and kept)"
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="where this device keeps its state")


def _compute_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=["auto", "onnx", "split", "torch", "toy"], default="auto", help="default: %(default)s"
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="a quantized base made by `edgetune quantize`")
    parser.add_argument("--max-memory", type=memory, metavar="SIZE", help="fit training into this, for example 2G")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one for each core)")


def _join_arguments(parser: argparse.ArgumentParser) -> None:
    _coordinator_argument(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl", help="this device's text")
    parser.add_argument(
        "--run", action="append", default=[], metavar="RUN", help="only this run; repeat, first preferred"
    )
    parser.add_argument("--stay", action="store_true", help="wait for new runs when all have ended")
    parser.add_argument(
        "--record-deltas", type=Path, metavar="DIR", help="write each round's delta there, too, as safetensors"
    )
    parser.add_argument(
        "--domain", metavar="NAME", help="the bank that this text belongs to, in runs of several; default: by its loss"
    )
    parser.add_argument("--middle", metavar="HOST:PORT", help="split learning: who runs `edgetune middle`")
    _rank_argument(parser, "what --max-memory allows")
    _state_arguments(parser)
    _compute_arguments(parser)


def _rank_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--rank",
        type=positive,
        metavar="N",
        help=f"at most this rank, in runs that let devices choose; default: {default}",
    )


def _taken_arguments(parser: argparse.ArgumentParser) -> None:
    """Which adapter: a run's, of a release, as this device has it."""
    _coordinator_argument(parser)
    parser.add_argument("--run", required=True, metavar="RUN", help="the run whose adapter it is")
    parser.add_argument("--domain", metavar="NAME", help="which of its adapters, where it has banks")
    _state_arguments(parser)
    _rank_argument(parser, "that of its last part in the run")
    parser.add_argument("--release", type=release_number, metavar="VERSION", help="default: the newest")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _taken_arguments(parser)
    parser.add_argument("out", type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--to", choices=["peft", "merged", "torch"], required=True, help="as `edgetune run export` has it"
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="a quantized base made by `edgetune quantize`")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to answer; - reads standard input")
    _taken_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as plain text, without the chat template"
    )
    _compute_arguments(parser)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--spec", type=Path, metavar="SPEC.toml", help="judge for this run (default: rank 8 on all layers)"
    )
    parser.add_argument(
        "--coordinator", type=addresses.called_at, metavar="HOST[:PORT]", help="measure the way to it, too"
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="whose identity to call it with")
    parser.add_argument("--insecure", action="store_true", help="call it without TLS and identity")
    parser.add_argument("--quick", action="store_true", help="reckon from sizes only: load nothing, time nothing")
    _compute_arguments(parser)


def run(args: argparse.Namespace) -> int:
    actions = {
        "join": _join,
        "enroll": _enroll,
        "status": _status,
        "leave": _leave,
        "generate": _generate,
        "export": _export,
        "doctor": _doctor,
    }
    return actions[args.action](args)


def state_folder(name: str | None) -> Path:
    """Where a device of this name keeps its state; one unnamed device a user."""
    import platformdirs

    return Path(platformdirs.user_data_dir("edgetune")) / "clients" / (name or "default")


def _connection(args: argparse.Namespace, folder: Path, tell: Tell | None = None) -> Connection:
    """The way to the coordinator that was named, or enrolled with; a person waits for answers where nobody is told. Raises
    IdentityError."""
    from edge_client import credentials
    from edge_client.transport import Connection
    from wire.identity import read_card

    card = read_card(folder / IDENTITY)
    address = args.coordinator or (card.coordinator if card else DEFAULT_COORDINATOR)
    identity = credentials.for_call(folder / IDENTITY, address, args.insecure, "device")
    return Connection(address, identity=identity, attended=tell is None, tell=tell)


def _helper(args: argparse.Namespace, folder: Path) -> Helper:
    """Who computes the middle layers: called with the identity that the coordinator is called with."""
    from edge_client import credentials
    from edge_client.middle import Helper

    return Helper(args.middle, credentials.for_call(folder / IDENTITY, args.middle, args.insecure, "device"))


def _enroll(args: argparse.Namespace) -> int:
    from edge_client.identity import enroll
    from edge_client.state import DeviceState
    from wire.identity import Invitation

    invitation = Invitation.parse(args.invitation)
    state = DeviceState(args.state or state_folder(args.name), args.name)
    try:
        identity = enroll(invitation, state.folder / IDENTITY, state.device)
    finally:
        state.close()
    ends_at = identity.certificate.not_after
    if args.json:
        shown = {"device": state.device, "coordinator": identity.coordinator, "certificate_ends_at": ends_at}
        print(json.dumps(shown))
        return 0
    print(f"device {state.device} is enrolled with {identity.coordinator}; its key stays in {state.folder / IDENTITY}")
    print("`edgetune client join --data FILE` takes part; the certificate is renewed by itself")
    return 0


def _join(args: argparse.Namespace) -> int:
    from edge_client import data, recording
    from edge_client.participate import participate
    from edge_client.session import Device, Session
    from edge_client.state import DeviceState

    examples = data.read(args.data)
    if args.record_deltas is not None:
        recording.prepare(args.record_deltas)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    state = DeviceState(args.state or state_folder(args.name), args.name)
    helper = _helper(args, state.folder) if args.middle else None
    engine = "split" if args.middle and args.engine == "auto" else args.engine
    device = Device(
        args.data, engine, args.base, args.max_memory, args.threads, args.record_deltas, args.rank, helper, args.domain
    )
    try:
        with _progress(args.json) as tell, _connection(args, state.folder, tell) as connection:
            participate(connection, Session(device, examples, state), state, tuple(args.run), args.stay, tell)
    finally:
        state.close()
    return 0


def _progress(as_json: bool) -> Any:
    if as_json:
        from edge_client.progress import JsonLines

        return JsonLines()
    from edge_client.progress import Screen

    return Screen()


def _status(args: argparse.Namespace) -> int:
    from edge_client.state import DeviceState
    from wire import spec
    from wire.identity import read_card

    state = DeviceState(args.state or state_folder(args.name), args.name)
    records = {run: spec.plain(state.record(run)) for run in state.runs()}
    card = read_card(state.folder / IDENTITY)
    state.close()
    if args.json:
        enrolled = card.coordinator if card else None
        shown = {"device": state.device, "state": str(state.folder), "coordinator": enrolled, "runs": records}
        print(json.dumps(shown))
        return 0
    where = f"enrolled with {card.coordinator}" if card else "not enrolled"
    print(f"device {state.device}, {where}, state in {state.folder}")
    for name, record in records.items():
        print(
            f"  {name}: {record['rounds']} rounds, {record['bytes_up']:,} bytes up, {record['bytes_down']:,} down,"
            f" held-out loss {_loss(record['loss_first'])} -> {_loss(record['loss_last'])}"
        )
    if not records:
        print("  no rounds yet; `edgetune client join` takes part")
    return 0


def _loss(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


def _leave(args: argparse.Namespace) -> int:
    from edge_client.state import DeviceState

    state = DeviceState(args.state or state_folder(args.name), args.name)
    task = state.task()
    if task is not None:
        with _connection(args, state.folder) as connection:
            connection.leave(state.device, task)
        state.end()
    if args.run:
        state.forget(args.run)
    state.close()
    given_back = f"{task.run} round {task.round}" if task else None
    text = json.dumps({"device": state.device, "task": given_back, "forgot": args.run})
    print(text if args.json else f"gave back: {given_back or 'nothing'}; forgot: {args.run or 'nothing'}")
    return 0


def _taken(args: argparse.Namespace) -> tuple[RunSpec, int, Base, Taken]:
    """A run, the version of a release, its base, and what this device computes with of it."""
    from edge_client import bases
    from edge_client.banks import initial_of
    from edge_client.releases import Releases
    from edge_client.session import methods
    from edge_client.taken import taken

    folder = args.state or state_folder(args.name)
    with _connection(args, folder) as connection:
        run, layout = connection.describe(args.run)
        base, row = bases.find(run.base, args.base), methods(run)[0].tunes()
        held = Releases().fetch(connection, run, layout, initial_of(run, row, base), args.release)
    return run, held.release.version, base, taken(run, row, base, held.trajectory, folder, args.rank, args.domain)


def _generate(args: argparse.Namespace) -> int:
    from edge_client.session import engine_class

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    run, version, base, mine = _taken(args)
    chosen = engine_class(args.engine, run, args.max_memory)
    if not hasattr(chosen, "generate"):
        raise UserError(f"base {run.base.model!r} has no language to answer in")
    engine = chosen.load(base, mine.row, mine.layout, args.max_memory, threads=args.threads)
    engine.write(mine.vector)
    text = engine.generate(prompt, args.max_new_tokens, args.temperature, args.seed, raw=args.raw)
    print(json.dumps({"run": run.name, "release": version, "answer": text}) if args.json else text)
    return 0


def _export(args: argparse.Namespace) -> int:
    from edge_client import export

    run, version, base, mine = _taken(args)
    write = {"peft": export.to_peft, "merged": export.to_merged, "torch": export.to_torch}[args.to]
    write(base, mine.row.placement(base), mine.layout, mine.vector, args.out)
    shown = {"run": run.name, "release": version, "to": args.to, "out": str(args.out)}
    text = f"release {version} of {run.name} as this device computes with it, written to {args.out}"
    print(json.dumps(shown) if args.json else text)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from edge_client import doctor
    from wire import run_spec, spec
    from wire.errors import MachineError

    found = doctor.suited(args.engine, args.max_memory) if args.spec is None else None
    described, why = found or (run_spec.read_toml(args.spec), "")
    report = doctor.examine(described, args.engine, args.base, args.max_memory, args.threads, not args.quick, why)
    if args.coordinator is not None:
        with _connection(args, args.state or state_folder(None)) as connection:
            report = dataclasses.replace(report, link=doctor.link(connection))
    print(json.dumps(spec.plain(report)) if args.json else doctor.text(report))
    return 0 if report.problem is None else MachineError.exit_code
