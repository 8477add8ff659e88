"""A folder of domains, NAME.train.jsonl and NAME.test.jsonl (or .gz); the key "client" says what belongs together."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edge_client import data
from edge_client.data import Example
from experiments.partitions import natural
from wire.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz")


def names(folder: Path) -> list[str]:
    """The domains of a folder. Raises DataError for a folder without any."""
    found = {path.name.split(".train.jsonl")[0] for end in ENDINGS for path in folder.glob(f"*.train{end}")}
    if not found:
        raise DataError(f"{folder}: no domains; expected files like law.train.jsonl and law.test.jsonl")
    return sorted(found)


def dealt(folder: Path, name: str, devices: int, seed: int) -> dict[str, list[Example]]:
    """The training examples of each device, in a random order. Whole clients go to one device, the largest first to the one
    that has least; where fewer than `devices` are named, lines are dealt one by one. Raises DataError."""
    keys, examples = read(folder, f"{name}.train")
    chance = np.random.Generator(np.random.Philox(key=seed))
    shares = natural(keys, devices, 0, chance)
    return {f"device-{n}": _shuffled([examples[i] for i in share], chance) for n, share in enumerate(shares)}


def held_out(folder: Path, name: str) -> list[Example]:
    """The test examples, in an order that is the same for every seed. Raises DataError."""
    return _shuffled(read(folder, f"{name}.test")[1], np.random.Generator(np.random.Philox(key=0)))


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each domain's text, by its name; a domain that cannot be read has none."""
    found = {}
    for name in names:
        with contextlib.suppress(DataError):
            each = [hashlib.sha256(_content(folder, f"{name}.{part}")[1]).digest() for part in ("train", "test")]
            found[name] = hashlib.sha256(b"".join(each)).hexdigest()
    return found


def _shuffled(examples: list[Example], chance: np.random.Generator) -> list[Example]:
    return [examples[i] for i in chance.permutation(len(examples))]


def read(folder: Path, stem: str) -> tuple[list[str], list[Example]]:
    """The client of each line, "" for none, and the lines as examples. Raises DataError."""
    path, content = _content(folder, stem)
    lines = [line for line in content.splitlines() if line.strip()]
    examples = [data.example(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return [str(json.loads(line).get("client", "")) for line in lines], examples


def _content(folder: Path, stem: str) -> tuple[Path, bytes]:
    """A file, and what it holds, unpacked. Raises DataError."""
    path = next((path for end in ENDINGS if (path := folder / f"{stem}{end}").exists()), None)
    if path is None:
        raise DataError(f"{folder}: has no {stem}.jsonl")
    try:
        return path, gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
