"""From a run's BaseRef to the base on this device, and the check that it is the same model everybody else computes on."""

from __future__ import annotations

from pathlib import Path

from edge_client.adapters import Base
from wire.errors import BaseModelError
from wire.run_spec import BaseRef

TOY = "toy"


def find(wanted: BaseRef, folder: Path | None = None) -> Base:
    """The base a run names: `folder` if given, else the one built (once) in the user's cache.

    Raises BaseModelError for a base of another digest, quantize's errors for one that cannot be had.
    """
    base = _open(wanted, folder)
    if wanted.digest and base.identity != wanted.digest:
        raise BaseModelError(
            f"the run tunes base {wanted.digest[:12]}… ({wanted.model}, {wanted.format}), but"
            f" {folder or 'the one built here'} is {base.identity[:12]}…; ask who created the run for its folder and give"
            " it as --base DIR"
        )
    return base


def _open(wanted: BaseRef, folder: Path | None) -> Base:
    if wanted.model == TOY:
        from edge_client.engines.toy import ToyBase

        return ToyBase()
    import quantize

    return quantize.open_base(folder) if folder is not None else quantize.cached_base(wanted.model, wanted.format)
