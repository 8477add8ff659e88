"""A disk that is really full: the federation of `crashes.py` over SQLite and files in a file system in memory, of which other
things leave it a little room, more in each attempt. When the disk is full that must be said by name; then room is made, the
store is checked against the receipts as it lies, the federation goes on, and the store is checked again.

Mounting needs root, of a user namespace at least:

    unshare --user --map-root-user --mount python -m tests.faults.full_disks FOLDER
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator import guards
from coordinator.stores import Place
from tests.faults import forks, invariants
from tests.faults.crashes import LAYOUT, RUN, Sweep, federation
from wire.errors import MachineError, Reason, Refused

DISK_BYTES = 4 << 20
STEP_BYTES = 9 << 12


@dataclasses.dataclass(frozen=True)
class Disk:
    """Mounted at `mount`; what clients and the judge write lies in `beside`."""

    mount: Path
    beside: Path

    def attempts(self) -> Iterator[dict[str, Any]]:
        """From no room to as much as the federation needs."""
        for room in range(0, DISK_BYTES, STEP_BYTES):
            yield (attempt := self._attempt(room))
            if attempt["ended"] == "done":
                return

    def _attempt(self, room: int) -> dict[str, Any]:
        """`ended` says how the federation did that had only so much room, `receipts` how many it had given."""
        own = self.beside / str(room)
        own.mkdir()
        for left in self.mount.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        place, ballast = Place.of(str(self.mount / "store"), None), self.mount / "ballast"
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(self.mount).free - room)))
        died = forks.ended(forks.alone(_fill, place, own))
        ballast.unlink()
        receipts = len(invariants.receipts([own / "journal"]))
        checked = forks.ended(forks.alone(Sweep(own).going_on, place, own))
        faults = json.loads((own / "faults.json").read_text()) if checked == 0 else ["checking failed"]
        ended = (own / "ended").read_text() if died == 0 else f"exit {died}"
        return {"room": room, "ended": ended, "receipts": receipts, "faults": faults}


def _fill(place: Place, own: Path) -> None:
    ended = "done"
    try:
        asyncio.run(federation(place, own / "journal"))
    except Refused as error:
        ended = error.reason.value
    except MachineError:
        ended = Reason.DISK_FULL.value  # at its start there is nobody to refuse
    (own / "ended").write_text(ended)


def main() -> None:
    folder = Path(sys.argv[1])
    disk = Disk(folder / "disk", folder / "beside")
    disk.mount.mkdir()
    disk.beside.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "edgetune", str(disk.mount)]
    subprocess.run(line, check=True)
    object.__setattr__(guards.DEFAULTS, "disk_reserve_bytes", 0)  # it would be said to be full before it is
    forks.warm_up(RUN, LAYOUT)
    for attempt in disk.attempts():
        print(json.dumps(attempt), flush=True)


if __name__ == "__main__":
    main()
