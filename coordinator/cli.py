"""`edgetune coordinator`: serve runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from coordinator import stores

EXAMPLES = """\
examples:
  edgetune coordinator serve
  edgetune coordinator serve --store /srv/edgetune --listen 0.0.0.0:7443
"""
DEFAULT_LISTEN = "127.0.0.1:7443"


def default_store() -> Path:
    """Where a coordinator keeps its state unless told otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("edgetune")) / "coordinator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    serve.add_argument("--json", action="store_true", help="one JSON object a line on standard output")


def run(args: argparse.Namespace) -> int:
    from coordinator.serve import serve

    folder = args.store or default_store()

    def ready(address: str) -> None:
        if args.json:
            print(json.dumps({"event": "listening", "address": address, "store": str(folder)}), flush=True)
        else:
            print(f"listening on {address}, state in {folder}; Ctrl-C stops", file=sys.stderr, flush=True)

    asyncio.run(serve(stores.embedded(folder), args.listen, ready))
    return 0
