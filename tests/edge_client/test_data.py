from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.data import Example, Message, example, read, split
from wire.errors import DataError

ANSWERED = (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({"text": "words", "id": 7}, Example(text="words")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            Example("", ANSWERED),
        ),
        ({"prompt": "q", "completion": "a"}, Example("", ANSWERED)),
        ({"instruction": "q", "output": "a"}, Example("", ANSWERED)),
        ({"instruction": "q", "input": "", "output": "a"}, Example("", ANSWERED)),
        ({"instruction": "q", "response": "a"}, Example("", ANSWERED)),
        ({"instruction": "q", "input": "c", "output": "a"}, Example("", (Message("user", "q\n\nc"), ANSWERED[1]))),
    ],
)
def test_every_common_form_of_a_line_is_understood(line: object, wanted: Example) -> None:
    assert example(json.dumps(line).encode(), "f:1") == wanted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "expected"),
        (b'{"txt": "x"}', "got the keys 'txt'"),
        (b"{}", "of nothing"),
        (b'{"text": "  "}', "text: expected text"),
        (b'{"text": 3}', "text: expected text, got 3"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"messages": []}', "assistant"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "role: expected one of system, user, assistant"),
        (b'{"messages": ["x"]}', "a table with role and content"),
        (b'{"instruction": "q"}', "expected"),
        (b'{"prompt": "q", "completion": null}', "completion: expected text, got None"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_without_usable_text_is_named_with_what_was_expected(line: bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        example(line, "f.jsonl:7")
    assert str(caught.value).startswith("f.jsonl:7: ")
    assert said in str(caught.value)


def test_the_line_number_is_that_of_the_file_blank_lines_counted(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n\r\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:4: text"):
        read(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"", "empty"), (b" \n\n", "empty"), (b'{"text": "a"}', "one example")],
)
def test_a_file_without_two_examples_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "d.jsonl")


def test_a_folder_is_not_a_data_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_a_split_keeps_every_example_once_and_neither_part_is_empty(fraction: float) -> None:
    examples = [Example(text=str(i)) for i in range(23)]
    train, held = split(examples, fraction, seed=4)
    assert train
    assert held
    assert sorted((*train, *held), key=examples.index) == examples
    assert split(examples, fraction, seed=4) == (train, held)


def test_another_seed_holds_out_other_examples() -> None:
    examples = [Example(text=str(i)) for i in range(100)]
    assert split(examples, 0.2, 1)[1] != split(examples, 0.2, 2)[1]
