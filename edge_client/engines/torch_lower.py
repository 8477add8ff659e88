"""The layers below the lowest tuned one, computed once a sequence (the activation cache of FedAdapter, arXiv 2205.10162)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from edge_client.engines import Tokens, torch_cut
from edge_client.engines.cuts import WHOLE, Cut
from edge_client.engines.kept import Kept


class Lower:
    """Layers of `body` before `layer`, in which nothing is tuned: no gradient goes there. What leaves them is computed for one
    sequence at a time, so that it has the same bits whether it was kept or not, and is kept within `limit` bytes."""

    def __init__(self, body: Any, layer: int, limit: int) -> None:
        self._body, self._cut = body, Cut(layer, 0)
        self._kept: Kept[torch.Tensor] = Kept(limit)

    def last_hidden(self, some: Sequence[Tokens], device: torch.device) -> torch.Tensor:
        """The last hidden states [B, T, D], with a gradient from `layer` on; shorter sequences are padded at the end."""
        entering = pad_sequence([self._entering(sequence, device) for sequence in some], batch_first=True)
        _, settings = torch_cut.entering(self._body, WHOLE, {"inputs_embeds": entering})
        return torch_cut.above(self._body, self._cut, entering, settings)

    def forget(self) -> None:
        """What is kept is no longer so: something in the lower layers was set anew."""
        self._kept.forget()

    def _entering(self, sequence: Tokens, device: torch.device) -> torch.Tensor:
        hidden = self._kept.get(sequence)
        if hidden is None:
            with torch.no_grad():
                ids = torch.tensor(sequence.ids[None], dtype=torch.int64, device=device)
                hidden = torch_cut.entering(self._body, self._cut, {"input_ids": ids})[0][0]
            self._kept.put(sequence, hidden)
        return hidden
