"""`edgetune coordinator`: make identities, serve runs, and sweep what no row names. What is asked of a running coordinator
is in `edgetune/devices.py`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.stores import Place, without_secrets
from wire import addresses
from wire.errors import EdgetuneError, MissingExtra, UserError, ended
from wire.identity import MAX_LIFETIME_S, is_loopback

if TYPE_CHECKING:
    from coordinator.identities import Doors, Trust

EXAMPLES = """\
examples:
  edgetune coordinator serve
  edgetune coordinator serve --store /srv/edgetune --listen 0.0.0.0:7443
  edgetune coordinator serve --store postgresql://edgetune@db/edgetune --blobs s3://bucket/edgetune --replicas 4
  edgetune coordinator serve --metrics 9464 --log-format json 2>> /var/log/edgetune.jsonl
  edgetune coordinator init --host fl.example.org
  edgetune coordinator invite --owner ann --quota 3
  edgetune coordinator devices
  edgetune coordinator revoke anns-phone
  edgetune coordinator thaw anns-phone
  edgetune coordinator invite --administrator bea
  edgetune coordinator enroll edgetune://fl.example.org:7444/… --name bea --identity ./bea
  edgetune coordinator administrators --revoke bea
  edgetune coordinator gc --dry-run

passwords stay out of the command line, where every user of the machine can read them: PGPASSWORD or ~/.pgpass for the
database; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the bucket, AWS_ENDPOINT_URL, AWS_REGION and AWS_ALLOW_HTTP for
where it is, or s3://bucket/prefix?endpoint=https://…&region=…&allow_http=true

OTEL_EXPORTER_OTLP_ENDPOINT says where spans of calls and transactions are sent (OTLP over HTTP; the extra `telemetry`)
"""
DEFAULT_LISTEN = "127.0.0.1:7443"
LAST_METRICS_PORT = addresses.LAST_PORT - 64
"""Each further replica shows its numbers one port higher."""
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def default_store() -> Path:
    """Where a coordinator keeps its state unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("edgetune")) / "coordinator"


def identity_folder(args: argparse.Namespace) -> Path:
    """The folder of a coordinator's identities: --identity, or beside its ledger if that is a folder."""
    folder: Path | None = args.identity
    beside = default_store() if args.store is None or "://" in args.store else Path(args.store)
    return folder or beside / "identity"


def default_identity() -> Path:
    """Where a coordinator of the default store has its identities."""
    return default_store() / "identity"


def check_insecure(args: argparse.Namespace) -> None:
    """Raises UserError for an identity that is named and would not be used."""
    if args.insecure and args.identity is not None:
        raise UserError("--insecure goes without identities, and --identity names one: leave one of them out")


def store_arguments(parser: argparse.ArgumentParser) -> None:
    """The two options that say where a store is; `place` reads them."""
    parser.add_argument(
        "--store", metavar="DIR|URL", help=f"the ledger: a folder, or postgresql://… (default: {default_store()})"
    )
    parser.add_argument(
        "--blobs", metavar="DIR|URL", help="updates and adapters: a folder, or s3://bucket/prefix (default: in --store)"
    )


def place(args: argparse.Namespace) -> Place:
    """Raises UserError for a database without --blobs."""
    return Place.of(args.store or str(default_store()), args.blobs)


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """The actions, for others to add theirs."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = _action(commands, "serve", "serve runs until stopped", "one JSON object a line on standard output")
    serve.add_argument(
        "--listen", type=addresses.listened_at, default=DEFAULT_LISTEN, metavar="HOST:PORT",
        help="default: %(default)s; port 0 picks one",
    )  # fmt: skip
    serve.add_argument(
        "--replicas", type=_count, metavar="N", help="processes that share the port; one that dies is replaced"
    )
    serve.add_argument(
        "--identity", type=Path, metavar="DIR",
        help="what `init` made, the same for every replica (default: STORE/identity, if it is there)",
    )  # fmt: skip
    serve.add_argument(
        "--enroll", type=addresses.listened_at, metavar="HOST:PORT",
        help="where devices get their certificates (default: the port after --listen's)",
    )  # fmt: skip
    serve.add_argument(
        "--certificates", type=_certificate_life_s, metavar="TIME",
        help="how long a device's certificate lives before it is renewed, at most 7d, its default",
    )  # fmt: skip
    serve.add_argument("--insecure", action="store_true", help="no TLS and no identities, even beyond this machine")
    serve.add_argument(
        "--metrics", type=_metrics_address, metavar="[HOST:]PORT",
        help="numbers for Prometheus at http://HOST:PORT/metrics (HOST by default: 127.0.0.1; the second of --replicas"
        " has the next port, and so on)",
    )  # fmt: skip
    serve.add_argument(
        "--log-format", choices=["text", "json"], default="text",
        help="what happens, one line an event on standard error: for people, or JSON; default: %(default)s",
    )  # fmt: skip
    gc = _action(
        commands,
        "gc",
        "delete uploads that were given up, and blobs that no update and no release names",
        "one JSON object",
    )
    for parser in (serve, gc):
        store_arguments(parser)
    gc.add_argument("--grace", type=_seconds, default=3600.0, metavar="TIME", help="spare what is newer (default: 1h)")
    gc.add_argument("--dry-run", action="store_true", help="delete nothing, only say what would be")
    init = _action(
        commands, "init", "make the certificate authority and an administrator's identity", "one JSON object"
    )
    init.add_argument("--dir", type=Path, metavar="DIR", help=f"default: {default_identity()}")
    init.add_argument(
        "--host", type=addresses.named, action="append", default=[], metavar="NAME",
        help="a name or address that devices reach this coordinator by; repeat, the first goes into invitations"
        " (default: this machine's name)",
    )  # fmt: skip
    return commands


def _action(commands: Any, name: str, summary: str, json_help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("expected 1 to 64")
    return int(text)


def _metrics_address(text: str) -> str:
    """An address to show numbers at: this machine's own callers alone, unless a host is named.

    >>> _metrics_address("9464"), _metrics_address("0.0.0.0:9464")
    ('127.0.0.1:9464', '0.0.0.0:9464')
    """
    address = addresses.listened_at(f"127.0.0.1:{text}" if text.isdigit() else text)
    if not 1 <= addresses.parse(address)[1] <= LAST_METRICS_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}: a port for numbers is 1 to {LAST_METRICS_PORT}")
    return address


def _seconds(text: str) -> float:
    """A time as people write it.

    >>> _seconds("90s"), _seconds("1h")
    (90.0, 3600.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and s, m, h or d, as in 30m")
    return float(found[1]) * UNITS_S[found[2]]


def _certificate_life_s(text: str) -> float:
    if not 0 < (seconds := _seconds(text)) <= MAX_LIFETIME_S:
        raise argparse.ArgumentTypeError(f"{text!r}: write 12h or 3d, at most 7d")
    return seconds


def run(args: argparse.Namespace) -> int:
    return {"serve": _serve, "gc": _gc, "init": _init}[args.action](args)


def _init(args: argparse.Namespace) -> int:
    from coordinator import authority

    folder = args.dir or default_identity()
    hosts = list(dict.fromkeys([*(args.host or [_own_name()]), "localhost", "127.0.0.1", "::1"]))
    authority.create(folder, hosts)
    admin = folder / "admin"
    if args.json:
        print(json.dumps({"identity": str(folder), "admin": str(admin), "hosts": hosts}))
        return 0
    print(f"certificate authority and keys in {folder}: keep a copy where nobody else can read it")
    print(f"the coordinator answers as {', '.join(hosts)}")
    print(f"administrator's identity in {admin}: copy it to where `edgetune run` is typed, name it by --identity")
    return 0


def _own_name() -> str:
    try:
        return addresses.host(socket.gethostname())
    except UserError as error:
        raise UserError(f"{error}: so this machine is called; say --host NAME") from error


def _serve(args: argparse.Namespace) -> int:
    """Whatever ends it is said as its lines are: as JSON where that was asked for."""
    from coordinator.events import last_words

    try:
        return _served(args)
    except EdgetuneError as error:
        if args.log_format == "text":
            raise
        print(last_words("json", error), file=sys.stderr, flush=True)
        if args.json:
            print(json.dumps(ended(error)), flush=True)
        return error.exit_code


def _served(args: argparse.Namespace) -> int:
    from coordinator.authority import Authority
    from coordinator.identities import Doors
    from coordinator.replicas import higher, serve_together
    from coordinator.serve import Serving, serve

    check_insecure(args)
    where, trust = place(args), None if args.insecure else _trust(args)
    if trust is None and (unused := [name for name in ("enroll", "certificates") if getattr(args, name) is not None]):
        raise UserError(f"--{unused[0]}: this coordinator has no identities, and so no device enrols with it")
    if args.metrics and importlib.util.find_spec("prometheus_client") is None:
        raise MissingExtra("prometheus-client", "metrics")

    def tell(event: str, about: dict[str, object]) -> None:
        if args.json:
            print(json.dumps({"event": event, **about}), flush=True)
        else:
            print(_said(event, about), file=sys.stderr, flush=True)

    def ready(doors: Doors) -> None:
        shown = {"store": without_secrets(where.ledger), "blobs": without_secrets(where.blobs)}
        enrolment = {"enrolment": doors.enrolment} if trust else {}
        tell("listening", {"address": doors.devices, **shown, **enrolment})
        if args.insecure and Authority.is_in(identity_folder(args)):
            tell("insecure", {"identity": str(identity_folder(args))})
        if args.metrics:
            tell("metrics", {"address": args.metrics})
        if "://" in where.ledger and "://" not in where.blobs:
            tell("blobs_here", {"blobs": where.blobs})

    listen = Doors(args.listen, args.enroll or higher(args.listen, 1)) if trust else Doors(args.listen)
    how = Serving(listen, trust, args.metrics, log=args.log_format)
    if args.replicas:
        serve_together(where, how, args.replicas, ready, tell)
    else:
        asyncio.run(serve(where.open(), how, ready))
    return 0


_SAID = {
    "listening": "listening on {address}, {doors}, state in {store}, blobs in {blobs}; Ctrl-C stops",
    "blobs_here": "{blobs} is a folder of this machine: a replica on another one must see the very same",
    "insecure": "--insecure: the identities in {identity} are not used",
    "metrics": "metrics at http://{address}/metrics",
    "replica_started": "replica {replica} runs as process {pid}",
    "replica_ended": "replica {replica} (process {pid}) ended with {code}; another one starts",
}


def _said(event: str, about: dict[str, object]) -> str:
    enrolment = about.get("enrolment")
    doors = f"devices enrol at {enrolment}" if enrolment else "no TLS, no identities: releases stay unsigned"
    return _SAID[event].format(**about, doors=doors)


def _gc(args: argparse.Namespace) -> int:
    from coordinator.garbage import sweep

    swept = asyncio.run(sweep(place(args).open(create=False), args.grace, args.dry_run))
    if args.json:
        print(json.dumps({"deleted": not args.dry_run, "blobs": swept.blobs, "bytes": swept.bytes}))
    else:
        print(f"{'would delete' if args.dry_run else 'deleted'} {swept.blobs} blobs, {swept.bytes:,} bytes")
    return 0


def _trust(args: argparse.Namespace) -> Trust | None:
    """What `init` made; None on this machine alone. Raises UserError for a door open to all, IdentityError for a folder
    that cannot be read."""
    from coordinator.authority import Authority
    from coordinator.identities import Trust

    folder = identity_folder(args)
    if Authority.found(folder) is not None:
        return Trust(folder, args.certificates or MAX_LIFETIME_S)
    if args.identity is not None:
        raise UserError(f"{folder}: no identities here; `edgetune coordinator init --dir {folder}` makes them")
    if not is_loopback(args.listen):
        raise UserError(
            f"--listen {args.listen} can be reached from other machines, and without identities whoever reaches it may do"
            f" anything: run `edgetune coordinator init --dir {folder}` first, or say --insecure"
        )
    return None
