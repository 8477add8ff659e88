"""What to call a coordinator with. Loads no cryptographic library where calls are plain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wire.errors import IdentityError
from wire.identity import Role, is_loopback, read_card

if TYPE_CHECKING:
    from edge_client.identity import Identity

_HOW = {
    "device": "ask its administrator for an invitation and type `edgetune client enroll INVITATION`",
    "admin": "copy the folder `admin` that `edgetune coordinator init` made, and name it by --identity",
}


def for_call(folder: Path, address: str, insecure: bool, role: Role) -> Identity | None:
    """The identity in `folder` (or in its `admin` folder) to call `address` with; None for plain calls.

    Raises IdentityError where there is none and the calls would leave this machine. One that is left out is said.
    """
    place = next((place for place in (folder, folder / "admin") if read_card(place) is not None), None)
    if insecure:
        if place is not None:
            print(f"--insecure: the identity in {place} is not used", file=sys.stderr)
        return None
    if place is not None:
        from edge_client.identity import Identity

        return Identity.read(place)
    if is_loopback(address):
        return None
    raise IdentityError(f"no identity for {address} in {folder}: {_HOW[role]}; --insecure goes without, unprotected")
