"""Examples to token sequences by a base's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_client.data import Example, Message
from edge_client.engines import Tokens
from edge_client.engines.sequences import answered, packed
from wire.errors import BaseModelError


class Text:
    """The tokenizer of a base folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.end: int = self.tokenizer.eos_token_id

    def sequences(self, examples: Sequence[Example], length: int) -> list[Tokens]:
        """Plain texts packed end to end; each dialogue a sequence of its own, with a loss on the assistant's turns."""
        texts = packed([self.ids(e.text) for e in examples if e.text], self.end, length)
        dialogues = [answered(self._turns(e.messages), length) for e in examples if e.messages]
        return texts + [tokens for tokens in dialogues if tokens is not None]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

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
        if self.tokenizer.chat_template is None:
            turns = [f"{m.role.capitalize()}: {m.content}\n" for m in messages]
            return "".join(turns) + ("Assistant:" if ask else "")
        table = [{"role": m.role, "content": m.content} for m in messages]
        return (
            str(self.tokenizer.apply_chat_template(table, tokenize=False, add_generation_prompt=ask)) if table else ""
        )
