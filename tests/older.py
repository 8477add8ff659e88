"""The program as it was an edition ago: it reads run specs of the first edition, says so, and knows no later key.

python -m tests.older coordinator serve …
python -m tests.older client join …
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from wire import run_spec


def forget(cls: Any) -> None:
    """Take the fields of later editions out of what a form of this class may have."""
    later = [field.name for field in dataclasses.fields(cls) if field.metadata.get("since", 1) > 1]
    for name in later:
        del cls.__dataclass_fields__[name]


def main() -> int:
    run_spec.EDITION = 1
    forget(run_spec.Cohort)
    forget(run_spec.RunSpec)
    from edgetune.cli import main as program

    return program()


if __name__ == "__main__":
    sys.exit(main())
