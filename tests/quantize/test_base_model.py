from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from quantize import QuantizeError, open_base, tensors
from quantize.base_model import MANIFEST, WEIGHTS, build
from quantize.errors import NoRoom
from tests.models import HIDDEN, LAYERS, tiny_llama
from tests.processes import edgetune


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


@pytest.mark.parametrize("base_format", ["nf4", "int8", "bf16"])
def test_a_base_reopens_with_the_identity_it_was_made_with(folder: Path, tmp_path: Path, base_format: str) -> None:
    made = build(str(folder), base_format, tmp_path / "base")
    again = open_base(tmp_path / "base")
    assert made.identity == again.identity
    assert again.format == base_format
    assert len(again.linears()) == 7 * LAYERS
    assert next(iter(again.linears().items())) == ("model.layers.0.self_attn.q_proj", (HIDDEN, HIDDEN))


def test_the_same_source_and_format_give_one_identity_and_others_another(folder: Path, tmp_path: Path) -> None:
    one = build(str(folder), "nf4", tmp_path / "one").identity
    assert build(str(folder), "nf4", tmp_path / "two").identity == one
    assert build(str(folder), "int8", tmp_path / "three").identity != one
    other = tiny_llama(tmp_path / "other", seed=1)
    assert build(str(other), "nf4", tmp_path / "four").identity != one


def test_a_base_is_a_fraction_of_the_float_model(folder: Path, tmp_path: Path) -> None:
    base = build(str(folder), "nf4", tmp_path / "base")
    linear = sum(4 * rows * columns for rows, columns in base.linears().values())
    stored = sum(part.nbytes for module in base.linears() for part in base.parts(f"{module}.weight").values())
    assert stored == linear * 4.5 / 32


def test_a_changed_file_is_found_when_the_base_is_opened(folder: Path, tmp_path: Path) -> None:
    build(str(folder), "nf4", tmp_path / "base")
    with (tmp_path / "base" / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(QuantizeError, match=r"model\.safetensors: changed since it was made"):
        open_base(tmp_path / "base")


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"schema": "edgetune-base-9"}'])
def test_a_damaged_manifest_is_one_clear_error(folder: Path, tmp_path: Path, content: str) -> None:
    build(str(folder), "nf4", tmp_path / "base")
    (tmp_path / "base" / MANIFEST).write_text(content)
    with pytest.raises(QuantizeError, match=r"damaged|another version"):
        open_base(tmp_path / "base")


def test_a_weight_that_is_not_finite_leaves_no_folder(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    tiny_llama(broken)
    file = tensors.SafeTensors(broken / "model.safetensors")
    values = {name: file.read(name).copy() for name in file.names()}
    values["model.norm.weight"][3] = np.nan
    tensors.write(broken / "model.safetensors", {n: ("F32", v.shape) for n, v in values.items()}, values.values())
    with pytest.raises(QuantizeError, match=r"model\.norm\.weight"):
        build(str(broken), "nf4", tmp_path / "out" / "base")
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_without_room_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(tensors, "write", full)
    with pytest.raises(NoRoom, match="No space left"):
        build(str(folder), "nf4", tmp_path / "out" / "base")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="exists already"):
        build(str(folder), "nf4", folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
    ],
)
def test_a_damaged_model_folder_is_one_line_and_exit_2(folder: Path, tmp_path: Path, spoil: object, said: str) -> None:
    spoil(folder)  # type: ignore[operator]
    done = edgetune("quantize", folder, "--format", "nf4", "--out", tmp_path / "base")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "base").exists()


def test_a_file_that_is_no_gguf_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    done = edgetune("quantize", tmp_path / "model.gguf", "--out", tmp_path / "base")
    assert done.returncode == 2
    assert "model.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_quantize_tells_scripts_what_it_made(folder: Path, tmp_path: Path) -> None:
    done = edgetune("quantize", folder, "--format", "int8", "--out", tmp_path / "base", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["identity"] == open_base(tmp_path / "base").identity
