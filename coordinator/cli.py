"""`edgetune coordinator`: serve runs, and sweep what no row names."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

from coordinator.stores import Place, without_secrets

EXAMPLES = """\
examples:
  edgetune coordinator serve
  edgetune coordinator serve --store /srv/edgetune --listen 0.0.0.0:7443
  edgetune coordinator serve --store postgresql://edgetune@db/edgetune --blobs s3://bucket/edgetune --replicas 4
  edgetune coordinator gc --dry-run

passwords stay out of the command line, where every user of the machine can read them: PGPASSWORD or ~/.pgpass for the
database; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the bucket, AWS_ENDPOINT_URL, AWS_REGION and AWS_ALLOW_HTTP for
where it is, or s3://bucket/prefix?endpoint=https://…&region=…&allow_http=true
"""
DEFAULT_LISTEN = "127.0.0.1:7443"
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def default_store() -> Path:
    """Where a coordinator keeps its state unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("edgetune")) / "coordinator"


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = _action(commands, "serve", "serve runs until stopped", "one JSON object a line on standard output")
    serve.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="default: %(default)s; port 0 picks one"
    )
    serve.add_argument(
        "--replicas", type=_count, metavar="N", help="processes that share the port; one that dies is replaced"
    )
    gc = _action(
        commands,
        "gc",
        "delete uploads that were given up, and blobs that no update and no release names",
        "one JSON object",
    )
    gc.add_argument("--grace", type=_seconds, default=3600.0, metavar="TIME", help="spare what is newer (default: 1h)")
    gc.add_argument("--dry-run", action="store_true", help="delete nothing, only say what would be")


def _action(commands: Any, name: str, summary: str, json_help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    store_arguments(parser)
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError("expected 1 to 64")
    return int(text)


def _seconds(text: str) -> float:
    """A time as people write it.

    >>> _seconds("90s"), _seconds("1h")
    (90.0, 3600.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and s, m, h or d, as in 30m")
    return float(found[1]) * UNITS_S[found[2]]


def run(args: argparse.Namespace) -> int:
    return {"serve": _serve, "gc": _gc}[args.action](args)


def _serve(args: argparse.Namespace) -> int:
    from coordinator.replicas import serve_together
    from coordinator.serve import serve

    where = place(args)

    def tell(event: str, about: dict[str, object]) -> None:
        if args.json:
            print(json.dumps({"event": event, **about}), flush=True)
        else:
            print(_SAID[event].format(**about), file=sys.stderr, flush=True)

    def ready(address: str) -> None:
        shown = {"ledger": without_secrets(where.ledger), "blobs": without_secrets(where.blobs)}
        tell("listening", {"address": address, "store": shown["ledger"], "blobs": shown["blobs"]})

    if args.replicas:
        serve_together(where, args.listen, args.replicas, ready, tell)
    else:
        asyncio.run(serve(where.open(), args.listen, ready))
    return 0


_SAID = {
    "listening": "listening on {address}, state in {store}, blobs in {blobs}; Ctrl-C stops",
    "replica_started": "replica {replica} runs as process {pid}",
    "replica_ended": "replica {replica} (process {pid}) ended with {code}; another one starts",
}


def _gc(args: argparse.Namespace) -> int:
    from coordinator.garbage import sweep

    swept = asyncio.run(sweep(place(args).open(create=False), args.grace, args.dry_run))
    if args.json:
        print(json.dumps({"deleted": not args.dry_run, "blobs": swept.blobs, "bytes": swept.bytes}))
    else:
        print(f"{'would delete' if args.dry_run else 'deleted'} {swept.blobs} blobs, {swept.bytes:,} bytes")
    return 0
