from __future__ import annotations

from pathlib import Path

import grpc

from wire import contract
from wire.contract import BARE, CONTRACT, MEANING, Action
from wire.errors import Reason, Refused, RemoteError, Unreachable

ERRORS_MD = Path(__file__).parents[2] / "docs" / "errors.md"


def test_every_reason_has_its_row_and_every_status_is_one_of_grpc() -> None:
    assert set(CONTRACT) == set(Reason)
    assert all(hasattr(grpc.StatusCode, status) for status in [*(rule.status for rule in CONTRACT.values()), *BARE])
    assert set(MEANING) == set(Action)


def test_one_status_never_asks_for_both_giving_up_and_going_on() -> None:
    """Who knows the status alone, a proxy or a newer reason's client, must not forget what he should send again."""
    forgets = {Action.NEXT, Action.DROP}
    for status in {rule.status for rule in CONTRACT.values()}:
        actions = {rule.action for rule in CONTRACT.values() if rule.status == status}
        assert not (actions & forgets and actions & {Action.RETRY, Action.RESUME}), status


def test_what_grpc_says_by_itself_never_drops_an_update() -> None:
    assert not set(BARE.values()) & {Action.NEXT, Action.DROP}
    assert contract.after(RemoteError("", "RESOURCE_EXHAUSTED")) is Action.ASK
    assert contract.after(RemoteError("", "UNAVAILABLE")) is Action.RETRY
    assert contract.after(Unreachable("")) is Action.RETRY
    assert contract.after(Refused(Reason.ROUND_CLOSED, "")) is Action.NEXT


def test_the_page_about_errors_is_what_the_table_gives() -> None:
    assert ERRORS_MD.read_text(encoding="utf-8") == contract.markdown(), "run `make docs` and commit"
