"""`edgetune coordinator`: make identities, serve runs. What is asked of a running coordinator is in `edgetune/devices.py`."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator import stores
from wire.errors import UserError
from wire.identity import DAY_S, MAX_LIFETIME_S, host_of, is_loopback

if TYPE_CHECKING:
    from coordinator.authority import Authority
    from coordinator.identities import Doors

EXAMPLES = """\
examples:
  edgetune coordinator serve
  edgetune coordinator serve --store /srv/edgetune --listen 0.0.0.0:7443
  edgetune coordinator init --host fl.example.org
  edgetune coordinator invite --owner ann --quota 3
  edgetune coordinator devices
  edgetune coordinator revoke anns-phone
"""
DEFAULT_LISTEN = "127.0.0.1:7443"


def default_store() -> Path:
    """Where a coordinator keeps its state unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("edgetune")) / "coordinator"


def default_identity() -> Path:
    """Where a coordinator of the default store has its identities."""
    return default_store() / "identity"


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """The actions, for others to add theirs."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = commands.add_parser(
        "serve", help="serve runs until stopped", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    serve.add_argument(
        "--store", type=Path, metavar="DIR", help=f"where all state is kept (default: {default_store()})"
    )
    serve.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="default: %(default)s; port 0 picks one"
    )
    serve.add_argument(
        "--identity", type=Path, metavar="DIR", help="what `init` made (default: STORE/identity, if it is there)"
    )
    serve.add_argument(
        "--enroll",
        metavar="HOST:PORT",
        help="where devices get their certificates (default: the port after --listen's)",
    )
    serve.add_argument(
        "--certificates", type=duration_s, default=MAX_LIFETIME_S, metavar="TIME",
        help="how long a device's certificate lives before it is renewed, at most 7d, its default",
    )  # fmt: skip
    serve.add_argument("--insecure", action="store_true", help="no TLS and no identities, even beyond this machine")
    serve.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    summary = "make the certificate authority and an administrator's identity"
    init = commands.add_parser(
        "init", help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    init.add_argument("--dir", type=Path, metavar="DIR", help=f"default: {default_identity()}")
    init.add_argument(
        "--host", action="append", default=[], metavar="NAME",
        help="a name or address that devices reach this coordinator by; repeat, the first goes into invitations"
        " (default: this machine's name)",
    )  # fmt: skip
    init.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return commands


def duration_s(text: str) -> float:
    """Seconds of "90s", "12h" or "7d".

    >>> duration_s("12h")
    43200.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    seconds = float(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_S}[found[2]] if found else 0.0
    if not 0 < seconds <= MAX_LIFETIME_S:
        raise argparse.ArgumentTypeError(f"{text!r}: write 12h or 3d, at most 7d")
    return seconds


def run(args: argparse.Namespace) -> int:
    return _init(args) if args.action == "init" else _serve(args)


def _init(args: argparse.Namespace) -> int:
    from coordinator import authority

    folder = args.dir or default_identity()
    hosts = list(dict.fromkeys([*(args.host or [socket.gethostname()]), "localhost", "127.0.0.1", "::1"]))
    authority.create(folder, hosts)
    admin = folder / "admin"
    if args.json:
        print(json.dumps({"identity": str(folder), "admin": str(admin), "hosts": hosts}))
        return 0
    print(f"certificate authority and keys in {folder}: keep a copy where nobody else can read it")
    print(f"the coordinator answers as {', '.join(hosts)}")
    print(f"administrator's identity in {admin}: copy it to where `edgetune run` is typed, name it by --identity")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from coordinator.identities import Identities
    from coordinator.serve import serve

    folder = args.store or default_store()
    authority = None if args.insecure else _authority(args, folder)
    store = stores.embedded(folder)
    who = Identities(store.ledger, authority, args.certificates) if authority else None

    def ready(doors: Doors) -> None:
        if args.json:
            shown = {"event": "listening", "address": doors.devices, "store": str(folder)}
            print(json.dumps(shown | ({"enrolment": doors.enrolment} if who else {})), flush=True)
            return
        how = f"devices enrol at {doors.enrolment}" if who else "no TLS, no identities: releases stay unsigned"
        print(f"listening on {doors.devices}, {how}, state in {folder}; Ctrl-C stops", file=sys.stderr, flush=True)

    asyncio.run(serve(store, args.listen, ready, who, args.enroll or _next_port(args.listen)))
    return 0


def _authority(args: argparse.Namespace, store_folder: Path) -> Authority | None:
    """What `init` made; None on this machine alone. Raises UserError for a door open to all."""
    from coordinator.authority import Authority

    folder = args.identity or store_folder / "identity"
    if (authority := Authority.found(folder)) is not None:
        return authority
    if args.identity is not None:
        raise UserError(f"{folder}: no identities here; `edgetune coordinator init --dir {folder}` makes them")
    if not is_loopback(args.listen):
        raise UserError(
            f"--listen {args.listen} can be reached from other machines, and without identities whoever reaches it may do"
            f" anything: run `edgetune coordinator init --dir {folder}` first, or say --insecure"
        )
    return None


def _next_port(listen: str) -> str:
    port = listen.rpartition(":")[2]
    following = str(int(port) + 1) if port.isdigit() and port != "0" else "0"
    host = host_of(listen)
    return f"[{host}]:{following}" if ":" in host else f"{host}:{following}"
