"""`edgetune coordinator`: its own actions, and what an administrator asks of a running coordinator about devices."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from coordinator import cli
from wire.errors import IdentityError, MissingExtra

DEFAULT_COORDINATOR = "127.0.0.1:7443"
FIRST_OWNER = "home"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = cli.add_arguments(parser)
    invite = _action(commands, "invite", "print a one-time invitation for a device")
    invite.add_argument("--owner", default=FIRST_OWNER, metavar="NAME", help="whose device; default: %(default)s")
    invite.add_argument(
        "--quota", type=int, metavar="N", help="how many devices this owner may have from now on (at first 16)"
    )
    invite.add_argument(
        "--hours", type=float, default=24.0, metavar="H", help="until it expires, at most 24; default: %(default)g"
    )
    invite.add_argument("--qr", action="store_true", help="draw it, too, for a device with a camera")
    _action(commands, "devices", "list the enrolled devices")
    revoke = _action(commands, "revoke", "end a device's part: at once, and for rounds that are still open")
    revoke.add_argument("device", metavar="DEVICE")


def _action(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=cli.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    administrator_arguments(parser)
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    return parser


def administrator_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the coordinator is, and who asks."""
    parser.add_argument("--coordinator", default=DEFAULT_COORDINATOR, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--identity", type=Path, metavar="DIR",
        help=f"an administrator's identity (default: {cli.default_identity()}, if it is there)",
    )  # fmt: skip
    parser.add_argument(
        "--insecure", action="store_true", help="call without TLS and identity, even beyond this machine"
    )


def connection(args: argparse.Namespace) -> Any:
    """An administrator's way to the coordinator. Raises IdentityError."""
    from edge_client import credentials
    from edge_client.transport import Connection

    folder = args.identity or cli.default_identity()
    identity = credentials.for_call(folder, args.coordinator, args.insecure, "admin")
    if args.identity is not None and identity is None and not args.insecure:
        raise IdentityError(f"{folder}: no identity here; `edgetune coordinator init` makes it")
    return Connection(args.coordinator, identity=identity)


def run(args: argparse.Namespace) -> int:
    actions = {"invite": _invite, "devices": _devices, "revoke": _revoke}
    return actions[args.action](args) if args.action in actions else cli.run(args)


def _invite(args: argparse.Namespace) -> int:
    with connection(args) as opened:
        invitation, expires_at = opened.invite(args.owner, args.quota, args.hours * 3600)
    if args.json:
        print(json.dumps({"invitation": invitation, "owner": args.owner, "expires_at": expires_at}))
        return 0
    print(invitation)
    if args.qr:
        print(_drawn(invitation))
    print(f"good once, until {_date(expires_at)}, for a device of {args.owner}; there:", file=sys.stderr)
    print(f"  edgetune client enroll '{invitation}'", file=sys.stderr)
    return 0


def _drawn(text: str) -> str:
    try:
        import segno
    except ModuleNotFoundError as error:
        raise MissingExtra("segno", "coordinator") from error
    import io

    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, compact=True)
    return drawn.getvalue()


def _devices(args: argparse.Namespace) -> int:
    with connection(args) as opened:
        devices = opened.devices()
    if args.json:
        print(json.dumps([dataclasses.asdict(device) for device in devices]))
        return 0
    for device in devices:
        ends = _date(device.certificate_ends_at)
        print(
            f"{device.name}: {device.state}, of {device.owner}, since {_date(device.enrolled_at)}, certificate to {ends}"
        )
    if not devices:
        print("no devices; `edgetune coordinator invite` makes an invitation for one")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    with connection(args) as opened:
        device = opened.revoke(args.device)
    text = json.dumps(dataclasses.asdict(device))
    print(
        text
        if args.json
        else f"{device.name} is revoked; it ends within seconds, and its updates to open rounds are out"
    )
    return 0


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
