"""Devices that keep a pair of their own, as real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts, write_toy_spec


@pytest.mark.parametrize("keeps", ["pair", "B"])
def test_what_is_a_devices_own_stays_in_its_folder_and_is_what_it_takes_home(keeps: str, tmp_path: Path) -> None:
    file = write_toy_spec(tmp_path / "run.toml", goal=2, minimum=2)
    lines = file.read_text()
    file.write_text(lines.replace("[method]", f'[method]\nadapter = {{ id = "lora", rank = 4, keeps = "{keeps}" }}'))
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        line = ("--coordinator", coordinator.address)
        assert edgetune("run", "create", file, *line).returncode == 0
        clients = [
            start_client(coordinator.address, write_texts(tmp_path / name, name), tmp_path / f"state-{name}", name=name)
            for name in ("anna", "ben")
        ]
        finished(clients)
        own = [np.load(tmp_path / f"state-{name}" / "runs" / "toy" / "own.npz")["own"] for name in ("anna", "ben")]
        assert own[0].any() and not np.array_equal(*own)
        weights = tmp_path / "state-anna" / "runs" / "toy" / "weights.npz"
        assert weights.exists() == (keeps == "pair")
        wanted = ("--to", "peft", tmp_path / "out", *line)
        taken = edgetune("client", "export", "--run", "toy", "--state", tmp_path / "state-anna", *wanted)
        assert "the toy base has no model" in taken.stderr
        nobody = edgetune("client", "export", "--run", "toy", "--state", tmp_path / "new", *wanted)
        assert nobody.returncode == 2 and "no part of its own" in nobody.stderr
        shared = edgetune("run", "export", "toy", *wanted)
        assert ("no model that all of them have" in shared.stderr) == (keeps == "B")
