"""What a person or a script sees of a client at work: a live line on standard error, or JSON lines on standard output."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any


class JsonLines:
    """Every event as one JSON object a line, at once."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        print(json.dumps({"event": event, **values}), flush=True)


class Screen:
    """A bar for the steps of the round at hand, and a line for each round that is done."""

    def __init__(self) -> None:
        from tqdm import tqdm  # needed here alone: clients on small machines count megabytes

        self._tqdm: Any = tqdm
        self._bar: Any = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        show = getattr(self, f"_on_{event}", None)
        if show is not None:
            show(values)

    def _on_waiting(self, values: dict[str, Any]) -> None:
        self._say(f"waiting for work ({values['active_runs']} runs going); Ctrl-C leaves")

    def _on_away(self, values: dict[str, Any]) -> None:
        self._say(f"no coordinator answers at {values['address']}: asking again ({values['detail']})")

    def _on_task(self, values: dict[str, Any]) -> None:
        self._clear()
        name = f"{values['run']} round {values['round']} {values['kind']}"
        self._bar = self._tqdm(desc=name, disable=None, leave=False, unit="step")

    def _on_step(self, values: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_description(
                f"{values['run']} round {values['round']} loss {values['loss']:.3f}", refresh=False
            )
            self._bar.total = values["steps"]
            self._bar.update(values["step"] - self._bar.n)

    def _on_uploading(self, values: dict[str, Any]) -> None:
        if self._bar is not None:
            done = 100 * values["sent"] // values["size"]
            self._bar.set_description(f"{values['run']} round {values['round']} sending {done} %")

    def _on_submitted(self, values: dict[str, Any]) -> None:
        self._clear()
        after = "" if values["loss_after"] is None else f", {values['loss_after']:.4f} after local training"
        ratio = "" if not values["bytes_up"] else f", {values['bytes_up']:,} bytes up"
        self._say(f"{values['run']} round {values['round']}: held-out loss {values['loss_before']:.4f}{after}{ratio}")

    def _on_split(self, values: dict[str, Any]) -> None:
        sent, received = values["sent"] / 1e6, values["received"] / 1e6
        self._say(f"{values['run']}: {sent:.1f} MB of hidden states to the helper so far, {received:.1f} MB back")

    def _on_unrecorded(self, values: dict[str, Any]) -> None:
        self._say(f"warning: {values['run']} round {values['round']} is not recorded, only sent: {values['detail']}")

    def _on_bank(self, values: dict[str, Any]) -> None:
        self._say(
            f"{values['run']} round {values['round']}: of the run's banks {values['bank']} fits this device's text"
        )

    def _on_too_late(self, values: dict[str, Any]) -> None:
        self._clear()
        self._say(f"{values['run']} round {values['round']} went on without this device: {values['detail']}")

    def _on_resuming(self, values: dict[str, Any]) -> None:
        self._say(f"{values['run']} round {values['round']}: sending again what has no receipt yet")

    def _on_finished(self, values: dict[str, Any]) -> None:
        self._say(f"done: {', '.join(values['runs'])}")

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, text: str) -> None:
        self._tqdm.write(text, file=sys.stderr)
