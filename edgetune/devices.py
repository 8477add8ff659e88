"""`edgetune coordinator`: its own actions, and what an administrator asks of a running coordinator about devices."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

from coordinator import cli
from edge_client.typed import device_name
from wire import addresses
from wire.errors import IdentityError, MissingExtra, UserError

DEFAULT_COORDINATOR = "127.0.0.1:7443"
FIRST_OWNER = "home"
LARGEST_QUOTA = 1_000_000
ALARMS = {
    "second_use": "somebody else brought its invitation, too; it is frozen",
    "two_addresses": "its certificate called from two addresses at once",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = cli.add_arguments(parser)
    invite = _action(commands, "invite", "print a one-time invitation for a device")
    invite.add_argument(
        "--owner", type=device_name, default=FIRST_OWNER, metavar="NAME", help="whose device; default: %(default)s"
    )
    invite.add_argument(
        "--quota", type=_quota, metavar="N", help="how many devices this owner may have from now on (at first 16)"
    )
    invite.add_argument(
        "--hours", type=float, default=24.0, metavar="H", help="until it expires, at most 24; default: %(default)g"
    )
    invite.add_argument("--qr", action="store_true", help="draw it, too, for a device with a camera")
    invite.add_argument(
        "--administrator",
        metavar="NAME",
        help="invite a further administrator instead, for `edgetune coordinator enroll`",
    )
    _action(commands, "devices", "list the enrolled devices, and at which of them somebody should look")
    revoke = _action(commands, "revoke", "end a device's part: at once, and for rounds that are still open")
    revoke.add_argument("device", metavar="DEVICE")
    thaw = _action(commands, "thaw", "say that you have looked at a device: its alarm ends, and a frozen one goes on")
    thaw.add_argument("device", metavar="DEVICE")
    enroll = _action(commands, "enroll", "become an administrator, by the invitation of another one")
    enroll.add_argument("invitation", metavar="INVITATION", help="what `edgetune coordinator invite` printed")
    enroll.add_argument("--name", required=True, metavar="NAME", help="the name that the invitation is for")
    administrators = _action(commands, "administrators", "list the administrators beside the first, or revoke one")
    administrators.add_argument("--revoke", metavar="NAME", help="end an administrator's calls")


def _quota(text: str) -> int:
    if not re.fullmatch("[0-9]{1,7}", text) or not 1 <= int(text) <= LARGEST_QUOTA:
        raise argparse.ArgumentTypeError(f"{text!r}: a quota is 1 to {LARGEST_QUOTA:,}")
    return int(text)


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
    parser.add_argument(
        "--coordinator", type=addresses.called_at, default=DEFAULT_COORDINATOR, metavar="HOST[:PORT]",
        help="default: %(default)s",
    )  # fmt: skip
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

    cli.check_insecure(args)
    folder = args.identity or cli.default_identity()
    identity = credentials.for_call(folder, args.coordinator, args.insecure, "admin")
    if args.identity is not None and identity is None:
        raise IdentityError(f"{folder}: no identity here; `edgetune coordinator init` makes it")
    return Connection(args.coordinator, identity=identity, attended=True)


def run(args: argparse.Namespace) -> int:
    actions = {
        "invite": _invite,
        "devices": _devices,
        "revoke": _revoke,
        "thaw": _thaw,
        "enroll": _enroll,
        "administrators": _administrators,
    }
    return actions[args.action](args) if args.action in actions else cli.run(args)


def _invite(args: argparse.Namespace) -> int:
    with connection(args) as opened:
        invitation, expires_at = (
            opened.invite_administrator(args.administrator, args.hours * 3600)
            if args.administrator
            else opened.invite(args.owner, args.quota, args.hours * 3600)
        )
    if args.json:
        whose = {"administrator": args.administrator} if args.administrator else {"owner": args.owner}
        print(json.dumps({"invitation": invitation, **whose, "expires_at": expires_at}))
        return 0
    print(invitation)
    if args.qr:
        print(_drawn(invitation))
    whom, command = f"a device of {args.owner}", f"client enroll '{invitation}'"
    if args.administrator:
        whom = f"administrator {args.administrator}"
        command = f"coordinator enroll '{invitation}' --name {args.administrator}"
    print(f"good once, until {_date(expires_at)}, for {whom}; there:", file=sys.stderr)
    print(f"  edgetune {command}", file=sys.stderr)
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
        if device.alarm:
            print(
                f"  look at it: {ALARMS.get(device.alarm, device.alarm)}; then `edgetune coordinator thaw` or `revoke`"
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


def _thaw(args: argparse.Namespace) -> int:
    with connection(args) as opened:
        device = opened.thaw(args.device)
    print(
        json.dumps(dataclasses.asdict(device)) if args.json else f"{device.name} is {device.state}; its alarm is over"
    )
    return 0


def _enroll(args: argparse.Namespace) -> int:
    from edge_client import identity
    from wire.identity import Invitation, read_card

    folder = args.identity or cli.default_identity() / "admin"
    invitation = Invitation.parse(args.invitation)
    if read_card(folder) is not None:
        raise UserError(f"{folder}: an identity is here already; name another folder by --identity")
    enrolled = identity.enroll(invitation, folder, args.name)
    if enrolled.certificate.role != "admin":
        raise UserError("this invitation is for a device: `edgetune client enroll` takes it")
    shown = {"administrator": args.name, "coordinator": enrolled.coordinator, "identity": str(folder)}
    said = f"{args.name} administers {enrolled.coordinator}; the key is in {folder}: name it by --identity"
    print(json.dumps(shown) if args.json else said)
    return 0


def _administrators(args: argparse.Namespace) -> int:
    with connection(args) as opened:
        found = [opened.revoke_administrator(args.revoke)] if args.revoke else opened.administrators()
    if args.json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
        return 0
    for one in found:
        print(
            f"{one.name}: {one.state}, since {_date(one.enrolled_at)}, certificate to {_date(one.certificate_ends_at)}"
        )
    if not found:
        print("nobody beside the first; `edgetune coordinator invite --administrator NAME` invites one")
    return 0


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
