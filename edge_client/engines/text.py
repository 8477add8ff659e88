"""Examples to token sequences by a base's own tokenizer and chat template. Needs no deep learning library."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_client.data import Example, Message
from edge_client.engines import Tokens
from edge_client.engines.sequences import answered, packed
from wire.errors import BaseModelError


class Text:
    """The tokenizer of a base folder. Raises BaseModelError for a folder without one, or without an end token."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizer's library raises nothing narrower
            raise BaseModelError(f"{folder}: its tokenizer cannot be read: {error}") from error
        self._special = {
            name: _content(self._config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        end = self._tokenizer.token_to_id(self._special["eos_token"] or "")
        if end is None:
            raise BaseModelError(f"{folder}/tokenizer_config.json: names no eos_token that the tokenizer has")
        self.end: int = end
        self._template = _template(self._config, folder)

    def sequences(self, examples: Sequence[Example], length: int) -> list[Tokens]:
        """Plain texts packed end to end; each dialogue a sequence of its own, with a loss on the assistant's turns."""
        texts = packed([self.ids(e.text) for e in examples if e.text], self.end, length)
        dialogues = [answered(self._turns(e.messages), length) for e in examples if e.messages]
        return texts + [tokens for tokens in dialogues if tokens is not None]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens or outer spaces."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def prompt(self, text: str, raw: bool) -> list[int]:
        """What the model is given to answer `text`; with `raw`, to continue it."""
        return self.ids(text if raw else self._rendered((Message("user", text),), True))

    def _turns(self, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        """(ids, learned) pieces: what each assistant turn adds to the dialogue before it is learned."""
        pieces: list[tuple[list[int], bool]] = []
        shown = ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            asked, answer = self._rendered(messages[:i], True), self._rendered(messages[: i + 1], False)
            if not asked.startswith(shown) or not answer.startswith(asked):
                raise BaseModelError(
                    "this base's chat template rewrites earlier turns: dialogues cannot be learned with it"
                )
            pieces += [(self.ids(asked[len(shown) :]), False), (self.ids(answer[len(asked) :]), True)]
            shown = answer
        return pieces

    def _rendered(self, messages: Sequence[Message], ask: bool) -> str:
        if self._template is None:
            turns = [f"{m.role.capitalize()}: {m.content}\n" for m in messages]
            return "".join(turns) + ("Assistant:" if ask else "")
        table = [{"role": m.role, "content": m.content} for m in messages]
        if not table:
            return ""
        special = {name: token for name, token in self._special.items() if token is not None}
        return str(self._template.render(messages=table, add_generation_prompt=ask, **special))


def _content(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it: a text, or a table with its text as `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _template(config: dict[str, Any], folder: Path) -> Any:
    """The chat template, compiled in a sandbox: it is text from wherever the base came from. None if there is none."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
    if isinstance(source, list):  # several by name: the default one
        source = next((t.get("template") for t in source if t.get("name") == "default"), None)
    if not source:
        return None
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    room.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    room.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form))
    try:
        return room.from_string(source)
    except TemplateError as error:
        raise BaseModelError(f"{folder}: its chat template cannot be read: {error}") from error


def _refuse(message: str) -> None:
    raise BaseModelError(f"this base's chat template refuses the dialogue: {message}")
