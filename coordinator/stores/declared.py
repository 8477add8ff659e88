"""What a writer of any row checks: the bytes that arrive are those that were declared, no more and no fewer."""

from __future__ import annotations

import hashlib

from wire.errors import Reason, Refused


class Declared:
    """Counts and digests bytes as they come. `digest` None: any bytes of the size will do."""

    def __init__(self, digest: str | None, size: int) -> None:
        self._digest, self._size = digest, size
        self._hash, self._written = hashlib.sha256(), 0

    def take(self, data: bytes | memoryview) -> None:
        """Raises Refused(BAD_SIZE) as soon as there are too many."""
        self._written += len(data)
        if self._written > self._size:
            raise Refused(Reason.BAD_SIZE, f"more than the declared {self._size} bytes arrived")
        self._hash.update(data)

    def checked(self) -> str:
        """The digest of all that came. Raises Refused(BAD_SIZE, BAD_DIGEST)."""
        digest = self._hash.hexdigest()
        if self._written != self._size:
            raise Refused(Reason.BAD_SIZE, f"{self._written} of the declared {self._size} bytes arrived")
        if self._digest is not None and digest != self._digest:
            raise Refused(Reason.BAD_DIGEST, "the bytes do not have the declared SHA-256")
        return digest
