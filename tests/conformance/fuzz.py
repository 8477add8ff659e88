"""`make fuzz`: a million mutated payloads for every decoder and both kinds of loops, under a limit of 512 MB.

    python -m tests.conformance.fuzz --payloads 1000000

A piece of 10,000 payloads that is done is a line of a file in `--out` and is not done again, unless the decoders or the mutations
have changed since: the file has the digest of their source for a name. A payload that breaks a decoder ends it, and is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from edge_client.typed import positive
from tests.conformance.test_mutations import CODECS, attack
from wire.codecs import chain, kernels

ROOT = Path(__file__).parents[2]
SOURCES = (*sorted((ROOT / "wire").rglob("*.py")), Path(__file__), Path(__file__).with_name("test_mutations.py"))
LIMIT_BYTES = 512 << 20
LOOPS = {"numpy": 1 << 62, "compiled": 0}
"""Kind of loops -> from how many entries on the compiled ones are taken."""
PIECE = 10_000


@dataclasses.dataclass(frozen=True)
class Piece:
    """Payloads of one decoder; `number` is their seed. `decoded` of them were those of an encoder, the others were refused."""

    codec: str
    loops: str
    number: int
    payloads: int
    decoded: int = 0
    seconds: float = 0.0


def edition() -> str:
    """A digest of all that a piece runs."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]


def played(piece: Piece) -> Piece:
    """The piece with what came of it, its memory limited."""
    kernels.LARGE, codec = LOOPS[piece.loops], chain.codec(CODECS[piece.codec])
    attack(codec, 10, piece.number)  # loads what it needs, before memory is limited
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, resource.RLIM_INFINITY))
    began, decoded = time.thread_time(), attack(codec, piece.payloads, piece.number)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return dataclasses.replace(piece, decoded=decoded, seconds=round(time.thread_time() - began, 2))


def wanted(codecs: Sequence[str], payloads: int) -> list[Piece]:
    """The pieces, so that all decoders get on alike."""
    starts = range(0, payloads, PIECE)
    return [
        Piece(codec, loops, start // PIECE, min(PIECE, payloads - start))
        for start, loops, codec in itertools.product(starts, LOOPS, codecs)
    ]


def done(file: Path) -> Iterator[Piece]:
    """What was done before."""
    if file.exists():
        yield from (Piece(**json.loads(line)) for line in file.read_text().splitlines())


def left(pieces: Sequence[Piece], found: Sequence[Piece]) -> list[Piece]:
    """The pieces that are not among those found."""
    known = {(piece.codec, piece.loops, piece.number, piece.payloads) for piece in found}
    return [piece for piece in pieces if (piece.codec, piece.loops, piece.number, piece.payloads) not in known]


def table(found: Sequence[Piece]) -> Iterator[str]:
    """A line for each decoder and kind of loops."""
    for (codec, loops), some in itertools.groupby(sorted(found, key=_of), key=_of):
        mine = list(some)
        payloads, decoded = sum(piece.payloads for piece in mine), sum(piece.decoded for piece in mine)
        each = 1e6 * sum(piece.seconds for piece in mine) / payloads
        yield f"{codec:24} {loops:9} {payloads:9,} payloads, {decoded:7,} decoded, {each:4.0f} µs each"


def _of(piece: Piece) -> tuple[str, str]:
    return piece.codec, piece.loops


def folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    path = Path(text)
    if not next(some for some in (path, *path.parents) if some.exists()).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, or lies in one; expected a folder")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", type=positive, default=1_000_000, help="for every decoder; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=sorted(CODECS), default=sorted(CODECS), metavar="CODEC")
    parser.add_argument("--out", type=folder, default=Path("fuzz-out"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file, pieces = args.out / f"{edition()}.jsonl", wanted(args.only, args.payloads)
    todo = left(pieces, list(done(file)))
    with tqdm(total=sum(p.payloads for p in pieces), unit=" payloads", unit_scale=True) as bar, file.open("a") as kept:
        bar.update(sum(p.payloads for p in pieces) - sum(p.payloads for p in todo))
        for piece in todo:
            bar.set_description(f"{piece.codec}, {piece.loops}")
            kept.write(json.dumps(dataclasses.asdict(played(piece))) + "\n")
            kept.flush()
            bar.update(piece.payloads)
    print("\n".join(table(list(done(file)))))


if __name__ == "__main__":
    main()
