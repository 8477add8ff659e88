"""What a coordinator may say, and what it cannot."""

from __future__ import annotations

import io
import json
import string
from typing import Any

import pytest

from coordinator.events import EVENTS, FIELDS, Format, Lines, shown


def said(how: Format, event: str, **about: Any) -> str:
    out = io.StringIO()
    Lines(how, out)(event, **about)
    return out.getvalue()


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_every_field_of_an_event_is_in_the_table(event: str) -> None:
    assert {name for _, name, _, _ in string.Formatter().parse(EVENTS[event]) if name} <= set(FIELDS)


def test_no_field_takes_free_text() -> None:
    hostile = ["two words of text", "a\nb", '{"event": "sealed"}', "-----BEGIN PRIVATE KEY-----", "x" * 200]
    for name in FIELDS:
        for value in hostile:
            assert shown("refused", {name: value}) == {}, (name, value)


def test_a_field_that_an_event_does_not_have_is_not_said() -> None:
    assert shown("enrolled", {"device": "d", "run": "r", "token": "secret"}) == {"device": "d"}


def test_json_has_one_object_a_line() -> None:
    line = said("json", "sealed", run="speeches", round=2, updates=3)
    found = json.loads(line)
    assert line.count("\n") == 1 and found.pop("time").endswith("Z")
    assert found == {"event": "sealed", "run": "speeches", "round": 2, "updates": 3}


def test_text_is_a_sentence_with_a_dash_for_what_is_not_known() -> None:
    line = said("text", "refused", method="CheckIn", reason="REVOKED", caller="device d")
    assert line.endswith("CheckIn is refused: REVOKED (caller: device d, run: -)\n")


def test_a_name_that_would_forge_a_line_is_not_said() -> None:
    line = said("text", "enrolled", device="d\n2026 device root is enrolled")
    assert line.endswith("device - is enrolled\n") and line.count("\n") == 1
