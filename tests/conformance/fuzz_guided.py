"""`make fuzz-guided`: payloads that reach new code of a decoder, found by atheris (libFuzzer) from what an encoder writes.

    python -m tests.conformance.fuzz_guided --only ecsq qsgd --seconds 600

Payloads that reached something are kept in a folder a decoder in `--out`, and the next time it begins with them. One that
breaks a decoder ends the program and is a file `crash-…` in the folder. Needs atheris: the dependency group `fuzz`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["wire"]):
    from edge_client.typed import positive
    from tests.conformance.fuzz import folder
    from tests.conformance.test_mutations import CODECS, LAYOUT, harmless, seed_payload
    from wire.codecs import chain, kernels
    from wire.codecs.chain import HEADER_BYTES

    kernels.LARGE = 1 << 62  # compiled loops tell nothing of where they are
    BUILT = {name: chain.codec(stages) for name, stages in CODECS.items()}  # loads every stage, ...
    SEEDS = {name: seed_payload(codec) for name, codec in BUILT.items()}  # ... and every loop

LIMIT_MB = 512
SLOWEST_S = 5
"""A payload of 155 entries that takes longer hangs."""


def explore(name: str, folder: Path, seconds: int) -> None:
    """One decoder; never returns. Inputs are what follows the header, so that none is spent on it."""
    codec, header, corpus = BUILT[name], SEEDS[name][:HEADER_BYTES], folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "encoded").write_bytes(SEEDS[name][HEADER_BYTES:])
    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={LIMIT_MB}", f"-timeout={SLOWEST_S}"]
    options += [f"-max_len={2 * codec.max_bytes(LAYOUT)}", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda body: harmless(codec, header + body))
    atheris.Fuzz()


def each(names: Sequence[str], folder: Path, seconds: int) -> int:
    """One process a decoder, since libFuzzer ends its own; the first status that is not 0."""
    for name in names:
        print(f"{name}:", file=sys.stderr, flush=True)
        line = [sys.executable, "-m", "tests.conformance.fuzz_guided", "--only", name]
        if status := subprocess.call([*line, "--out", str(folder), "--seconds", str(seconds), "--here"]):
            return status
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=positive, default=60, help="for every decoder; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=sorted(CODECS), default=sorted(CODECS), metavar="CODEC")
    parser.add_argument("--out", type=folder, default=Path("fuzz-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        explore(args.only[0], args.out / args.only[0].replace(" ", "-"), args.seconds)
    return each(args.only, args.out, args.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
