"""What a whole federation writes down: all that happened, and no secret."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_client.identity import Identity
from tests.e2e.test_identities import create, enroll
from tests.processes import administrator, edgetune, identified, start_client
from wire.identity import read_key

SECRET_WORD = "xylographic"
"""In the text of every device."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str, list[str]]:
    """The coordinator's events, all that anybody wrote, and the secrets that must not be in it."""
    folder = tmp_path_factory.mktemp("federation")
    log = folder / "coordinator.log"
    with identified(folder / "store", "--log-format", "json", log=log) as coordinator:
        create(coordinator, folder, goal=2, codec="int8")
        states = [enroll(coordinator, folder, name) for name in ("one", "two")]
        invited = edgetune("coordinator", "invite", "--json", *coordinator.admin)
        invitation = json.loads(invited.stdout)["invitation"]
        for name in ("three", "thief"):
            edgetune("client", "enroll", invitation, "--state", folder / name, "--name", name)
        edgetune("coordinator", "thaw", "three", *coordinator.admin)
        said = list[str]()
        for name in ("one", "two"):
            (folder / f"{name}.jsonl").write_text(f'{{"text": "{SECRET_WORD} {name} and more of it"}}\n' * 12)
        clients = [
            start_client(coordinator.address, folder / f"{state.name}.jsonl", state, name=state.name)
            for state in states
        ]
        for client in clients:
            out, err = client.communicate(timeout=120)
            assert client.returncode == 0, err
            said += [out, err]
        edgetune("coordinator", "revoke", "two", *coordinator.admin)
        with administrator(coordinator) as admin:
            admin.invite_administrator("bea", 60.0)
    keys = [read_key(place) for place in (*(s / "identity" for s in states), coordinator.identity / "admin")]
    pems = [*filter(None, keys), *((coordinator.identity / name).read_text() for name in ("ca.key", "release.key"))]
    secrets = [line for pem in pems for line in pem.splitlines() if not line.startswith("-----")]
    secrets += [SECRET_WORD, invitation.rpartition("/")[2], Identity.read(states[0] / "identity").tls()[2].decode()]
    text = log.read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")], text + "".join(said), secrets


def test_everything_that_happened_is_an_event(written: tuple[list[dict[str, Any]], str, list[str]]) -> None:
    events = written[0]
    kinds = [event["event"] for event in events]
    assert {"created", "invited", "enrolled", "alarm", "refused", "thawed", "sealed", "published", "revoked"} <= set(
        kinds
    )
    assert {"administrator", "draining"} <= set(kinds)
    assert kinds.count("enrolled") == 3 and kinds.count("published") == kinds.count("sealed") > 0
    (refused,) = [event for event in events if event["event"] == "refused"]
    assert (refused["method"], refused["reason"]) == ("Enroll", "BAD_TOKEN")
    (alarm,) = [event for event in events if event["event"] == "alarm"]
    assert (alarm["device"], alarm["alarm"]) == ("three", "second_use")


def test_no_secret_is_written_down(written: tuple[list[dict[str, Any]], str, list[str]]) -> None:
    _, text, secrets = written
    assert len(secrets) >= 15 and len(text) > 1000
    assert [secret for secret in secrets if secret in text] == []
