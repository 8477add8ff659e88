"""A quantized base on disk: made as a stream, opened through a memory map, named by the digest of its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize import sources, tensors
from quantize.emulator import KEPT, Emulator
from quantize.errors import NoRoom, QuantizeError
from quantize.formats import FORMATS, SCHEMES, Scheme, is_linear, is_norm, scheme_for
from quantize.sources import Source, file_digest
from quantize.tensors import SafeTensors

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""
MANIFEST, WEIGHTS = "edgetune-base.json", "model.safetensors"
SCHEMA = "edgetune-base-1"
EMBEDDING = "model.embed_tokens.weight"


class QuantizedBase:
    """An opened base folder. `open_base` has checked that every file is the one the manifest names."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self._manifest = folder, manifest
        self.format: str = manifest["format"]
        self._file = SafeTensors(folder / WEIGHTS)

    @property
    def identity(self) -> str:
        """SHA-256 of the canonical manifest: what client and coordinator agree on."""
        return _identity(self._manifest)

    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Module name -> (out, in) of every linear layer, in the model's order."""
        found = [(name.removesuffix(".weight"), self.shape(name)) for name in self.names() if is_linear(name)]
        return {module: (shape[0], shape[1]) for module, shape in sorted(found, key=lambda item: _natural(item[0]))}

    def norms(self) -> Mapping[str, int]:
        """Module name -> width of every norm, in the model's order."""
        found = [(name.removesuffix(".weight"), self.shape(name)) for name in self.names() if is_norm(name)]
        return {module: shape[0] for module, shape in sorted(found, key=lambda item: _natural(item[0]))}

    def biases(self) -> Mapping[str, int]:
        """Module name -> width of every linear layer's bias."""
        return {m: rows for m, (rows, _) in self.linears().items() if f"{m}.bias" in self._manifest["tensors"]}

    @property
    def kept_layers(self) -> tuple[int, ...] | None:
        """Of an emulator: which layers of the whole model it has."""
        kept = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get(KEPT)
        return None if kept is None else tuple(kept)

    def embedding(self) -> tuple[int, int]:
        """Tokens of the vocabulary, and the width of their embeddings."""
        tokens, width = self.shape(EMBEDDING)
        return tokens, width

    def embeddings(self, tokens: Sequence[int]) -> Array:
        """The rows of `tokens` as float32 [len(tokens), width]. Only theirs are read: a table can be half of a model."""
        shape, parts = self.embedding(), self.parts(EMBEDDING)
        if any(len(part) != shape[0] for part in parts.values()):
            return self.dequantized(EMBEDDING)[list(tokens)]
        chosen = {suffix: part[list(tokens)] for suffix, part in parts.items()}
        return SCHEMES[self.scheme(EMBEDDING)].decode(chosen, (len(tokens), shape[1]))

    def names(self) -> list[str]:
        return list(self._manifest["tensors"])

    def scheme(self, name: str) -> str:
        return str(self._manifest["tensors"][name]["scheme"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._manifest["tensors"][name]["shape"])

    def parts(self, name: str) -> dict[str, Array]:
        """The stored arrays of a tensor, as views of the file."""
        scheme = SCHEMES[self.scheme(name)]
        return {suffix: self._file.read(name + suffix) for suffix in scheme.stored(self.shape(name))}

    def dequantized(self, name: str) -> Array:
        """A tensor as float32."""
        return SCHEMES[self.scheme(name)].decode(self.parts(name), self.shape(name))

    def place(self, stored: str) -> tuple[str, int, Array]:
        """Where a stored array lies: the file's name in this folder, its offset in bytes, and the array as a view."""
        return WEIGHTS, self._file.offset(stored), self._file.read(stored)

    def give_back(self) -> None:
        """Return the memory of what was read so far; reading again is as before."""
        self._file.give_back()

    @property
    def bytes_on_disk(self) -> int:
        return (self.folder / WEIGHTS).stat().st_size


def open_base(folder: Path) -> QuantizedBase:
    """A base made by `build`. Raises QuantizeError if it is not one, or if a file of it was changed."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise QuantizeError(
                f"{folder}: made by another version of this program ({manifest['schema']}); make it again"
            )
        for name, wanted in manifest["files"].items():
            if file_digest(folder / Path(name).name) != wanted:
                raise QuantizeError(
                    f"{folder}/{name}: changed since it was made; make the base again with `edgetune quantize`"
                )
    except OSError as error:
        raise QuantizeError(
            f"{folder}: not a quantized base ({error.strerror}: {error.filename}); `edgetune quantize` makes one"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizeError(f"{path}: damaged: {error}") from error
    return QuantizedBase(folder, manifest)


def build(
    model: str, base_format: str, out: Path, progress: Progress | None = None, keep: Sequence[int] | None = None
) -> QuantizedBase:
    """Make a quantized base in the new folder `out`, of the layers `keep` alone if given: all of it, or nothing.

    Raises QuantizeError, NoRoom."""
    if base_format not in FORMATS:
        raise QuantizeError(f"unknown format {base_format!r}; choose one of {', '.join(sorted(FORMATS))}")
    if out.exists():
        raise QuantizeError(f"{out}: exists already; choose another --out or remove it")
    with _aside(out) as folder:
        download = folder / "download"
        source = sources.resolve(model, download)
        source = source if keep is None else Emulator(source, keep)
        _fill(folder, source, base_format, progress)
        shutil.rmtree(download, ignore_errors=True)
        folder.rename(out)
    return open_base(out)


def cached_base(model: str, base_format: str, progress: Progress | None = None) -> QuantizedBase:
    """The base of `model` in the user's cache, made there first if need be; two processes may ask at once."""
    if base_format not in FORMATS:
        raise QuantizeError(f"unknown format {base_format!r}; choose one of {', '.join(sorted(FORMATS))}")
    with tempfile.TemporaryDirectory() as unused:
        source = sources.known_digest(model) or sources.resolve(model, Path(unused)).digest
    out = cache() / f"{source[:16]}-{base_format}"
    with _locked(out):
        return open_base(out) if out.exists() else build(model, base_format, out, progress)


def cache() -> Path:
    """Where bases are kept: EDGETUNE_CACHE, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("EDGETUNE_CACHE") or platformdirs.user_cache_dir("edgetune")) / "bases"


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(out.name + ".lock").open("a")
    except OSError as error:
        raise NoRoom(f"{out.parent}: cannot keep base models here: {error.strerror}; set EDGETUNE_CACHE") from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:  # Windows: two processes that build the same base race, and the loser's rename fails aloud
            pass
        yield


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone afterwards, unless it was renamed."""
    folder: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        raise NoRoom(f"{error.filename or out}: {error.strerror}; nothing was kept") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, source: Source, base_format: str, progress: Progress | None) -> None:
    config = source.config()
    shapes = {name: shape for name, shape in source.shapes().items() if not _tied(name, config)}
    if not any(is_linear(name) for name in shapes):
        raise QuantizeError(f"model type {config.get('model_type')!r}: none of its layers has the Llama family's names")
    schemes = {name: scheme_for(name, shape, base_format) for name, shape in shapes.items()}
    files = {"config.json": json.dumps(config, indent=1, sort_keys=True).encode()} | source.side_files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    declared = {
        name + suffix: stored
        for name, shape in shapes.items()
        for suffix, stored in SCHEMES[schemes[name]].stored(shape).items()
    }
    tensors.write(folder / WEIGHTS, declared, _encoded(source, shapes, schemes, progress))
    manifest = {
        "schema": SCHEMA,
        "format": base_format,
        "source": source.digest,
        "files": {name: file_digest(folder / name) for name in sorted([*files, WEIGHTS])},
        "tensors": {name: {"scheme": schemes[name], "shape": list(shape)} for name, shape in shapes.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _encoded(
    source: Source, shapes: Mapping[str, tuple[int, ...]], schemes: Mapping[str, str], progress: Progress | None
) -> Iterator[Array]:
    for done, name in enumerate(shapes, 1):
        yield from _parts(source, name, SCHEMES[schemes[name]]).values()
        if progress is not None:
            progress(done, len(shapes))


def _parts(source: Source, name: str, scheme: Scheme) -> dict[str, Array]:
    """A tensor in its scheme: from the source's own blocks where both have the same, else quantized from floats."""
    blocks = source.blocks(name) if scheme.pack is not None else None
    if blocks is not None and scheme.pack is not None and blocks.bits == scheme.bits:
        _finite(name, blocks.scales)
        return scheme.pack(blocks)
    values = source.read(name)
    _finite(name, values)
    return scheme.encode(values)


def _finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise QuantizeError(f"tensor {name!r} has an entry that is not a finite number")


def _tied(name: str, config: Mapping[str, Any]) -> bool:
    return name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))


def _identity(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9, and within a layer as the model computes."""
    order = [
        "layers",
        "input_layernorm",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "q_norm",
        "k_norm",
        "post_attention_layernorm",
        "mlp",
        "gate_proj",
        "up_proj",
        "down_proj",
        "norm",
    ]
    parts = re.split(r"\.", name)
    return [(int(p), "") if p.isdigit() else (order.index(p) if p in order else -1, p) for p in parts]
