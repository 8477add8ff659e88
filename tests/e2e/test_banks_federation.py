"""A run of two banks as real processes: by name, by loss, and taken home."""

from __future__ import annotations

from pathlib import Path

from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts, write_toy_spec


def test_devices_join_by_domain_or_by_loss_and_each_bank_is_taken_home_by_name(tmp_path: Path) -> None:
    file = write_toy_spec(tmp_path / "run.toml", goal=3, minimum=3)
    file.write_text(file.read_text() + '[portions]\nid = "bank"\nnames = ["law", "code"]\n')
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        line = ("--coordinator", coordinator.address)
        assert edgetune("run", "create", file, *line).returncode == 0
        lost = start_client(
            coordinator.address, write_texts(tmp_path / "x", "x"), tmp_path / "s", "--domain", "art", name="x"
        )
        assert "no 'art': it has the banks law, code" in lost.communicate(timeout=60)[1] and lost.returncode == 2
        domains = {"anna": ("--domain", "law"), "ben": ("--domain", "code"), "cleo": ()}
        words = {"anna": "court", "ben": "xyzzy", "cleo": "xyzzy"}
        clients = [
            start_client(
                coordinator.address, write_texts(tmp_path / who, words[who]), tmp_path / f"of-{who}", *more, name=who
            )
            for who, more in domains.items()
        ]
        events = dict(zip(domains, finished(clients), strict=True))
        chosen = [event["bank"] for event in events["cleo"] if event["event"] == "bank"]
        assert chosen[-1] == "code" and len(chosen) == 4, "three rounds, and the evaluation of what came of them"
        assert not [event for who in ("anna", "ben") for event in events[who] if event["event"] == "bank"]
        losses = [event["loss_before"] for event in events["cleo"] if event["event"] == "submitted"]
        assert losses[-1] < losses[0] - 0.5
        assert edgetune("run", "verify", "toy", "--store", tmp_path / "store").returncode == 0
        for command in (
            ("run", "export", "toy"),
            ("client", "export", "--run", "toy", "--state", tmp_path / "of-anna"),
        ):
            asked = (*command, "--to", "peft", tmp_path / "out", *line)
            assert "name one as --domain" in edgetune(*asked).stderr
            assert "the toy base has no model" in edgetune(*asked, "--domain", "law").stderr
