"""Text for clients: parts of a source by its natural key, or of a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_client import data
from experiments.texts import Texts, reuters, shakespeare
from wire.errors import DataError

Parts = dict[str, list[str]]
"""Client name -> JSON lines."""
MOST_WORDS = 12_000
"""Words that one client gets at most: what a few hundred short sequences read about once."""


def parts(named: str, clients: int) -> Parts:
    """`clients` parts of the text that `named` says: a row of SOURCES, or a JSON lines file. Raises DataError."""
    if named not in SOURCES:
        return _file(Path(named), clients)
    texts = SOURCES[named]()
    largest = sorted(texts, key=lambda key: (-sum(len(t.split()) for t in texts[key]), key))[:clients]
    if len(largest) < clients:
        raise DataError(f"--clients {clients}: {named} has {len(texts)} parts")
    return {_slug(key): [json.dumps({"text": t}) for t in _up_to(texts[key], MOST_WORDS)] for key in largest}


def digests(named: str) -> dict[str, str]:
    """The SHA-256 of a file, by its name; of a row of SOURCES, whose package has a version, nothing. Raises DataError."""
    if named in SOURCES:
        return {}
    try:
        return {named: hashlib.sha256(Path(named).read_bytes()).hexdigest()}
    except OSError as error:
        raise DataError(f"{named}: cannot be read: {error.strerror}") from error


SOURCES: Mapping[str, Callable[[], Texts]] = {"shakespeare": shakespeare, "reuters": reuters}
"""Name of --data -> texts by key."""


def _file(path: Path, clients: int) -> Parts:
    """A JSON lines file, dealt to the clients in blocks: neighbours usually belong together."""
    lines = len(data.read(path))
    if lines < 2 * clients:
        raise DataError(f"{path}: {lines} examples for {clients} clients; each needs two or more")
    filled = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return {f"part-{i + 1}": filled[i * lines // clients : (i + 1) * lines // clients] for i in range(clients)}


def _up_to(texts: list[str], words: int) -> list[str]:
    """An even choice, in order, of at most `words` words in all, that is the same every time."""
    ranked = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{i}".encode()).digest())
    chosen: set[int] = set()
    total = 0
    for i in ranked:
        total += len(texts[i].split())
        if total > words and chosen:
            break
        chosen.add(i)
    return [text for i, text in enumerate(texts) if i in chosen]


def _slug(key: str) -> str:
    """A device name.

    >>> _slug("KING HENRY henry-v")
    'king-henry-henry-v'
    """
    return re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")[:60]
