"""Blobs in a bucket of any S3-compatible server that honours create-only puts (`If-None-Match: *`).

`s3://bucket/prefix?endpoint=https://…&region=…&allow_http=true`; credentials, and whatever the URL leaves out, come from
the usual variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, AWS_ALLOW_HTTP).

A blob is spooled to a local file while it arrives, checked, and put in one request from a mapping of that file: nothing
is visible before it is whole, and no blob is ever in memory as a whole. The same way back.
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from coordinator.stores import without_secrets
from coordinator.stores.declared import Declared
from wire import spec
from wire.errors import EdgetuneError, MachineError, Reason, Refused, StoreError, UserError

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig

IN_MEMORY_BYTES = 1 << 20
"""A blob up to this long is not worth a file."""
READ_BYTES = 4 << 20
TRY_FOR = datetime.timedelta(seconds=20)
TRIES = 5
RENEWED_AFTER_S = 600.0
"""A put of a blob that has been there for longer renews its age, so that `gc` leaves it alone."""
PROBE = "probe"
DIGEST = re.compile(r"[0-9a-f]{64}")
OPTIONS = {"endpoint", "region", "allow_http", "virtual_hosted_style_request"}


class _S3Writer:
    def __init__(self, blobs: S3Blobs, spool: IO[bytes], digest: str | None, size: int) -> None:
        self._blobs, self._spool, self._size = blobs, spool, size
        self._declared = Declared(digest, size)

    def write(self, data: bytes | memoryview) -> None:
        self._declared.take(data)
        with _disk():
            self._spool.write(data)

    def commit(self) -> str:
        digest = self._declared.checked()
        with _disk():
            data = _mapped(self._spool, self._size)
        self._blobs.create(digest, data)
        return digest


class S3Blobs:
    """See `coordinator.stores.Blobs`. Raises MachineError for a bucket that cannot be used, UserError for a bad URL."""

    def __init__(self, url: str) -> None:
        self._place = without_secrets(url)
        self._store = _store(url)
        self._probe()

    def _probe(self) -> None:
        """A server that lets the second of two create-only puts win would let anybody replace a blob."""
        try:
            with contextlib.suppress(AlreadyExistsError):
                self._put(PROBE, b"edgetune")
            self._put(PROBE, b"edgetune")
        except AlreadyExistsError:
            return
        except FileNotFoundError:
            raise MachineError(f"{self._place}: there is no such bucket; make it first") from None
        except (BaseError, OSError) as error:
            raise MachineError(f"{self._place}: cannot keep blobs here: {_said(error)}{_wanting()}") from None
        raise MachineError(
            f"{self._place}: this server ignores create-only puts (If-None-Match: *); blobs are not safe with it"
        )

    def _put(self, name: str, data: bytes | memoryview, mode: Any = "create") -> None:
        obstore.put(self._store, name, data, mode=mode, use_multipart=False)

    @contextlib.contextmanager
    def writer(self, digest: str | None, size: int) -> Iterator[_S3Writer]:
        with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as spool:
            yield _S3Writer(self, spool, digest, size)

    def create(self, digest: str, data: bytes | memoryview) -> None:
        """Give checked bytes their name. The winner of a race and the loser have the same bytes. A conflict (409) can
        also mean that the winner has not finished: then there is nothing yet, and the put is tried again."""
        for attempt in range(TRIES):
            with _server(digest):
                try:
                    self._put(digest, data)
                    return
                except AlreadyExistsError:
                    if self._is_there(digest, data):
                        return
            time.sleep(random.uniform(0.05, 0.2) * 2**attempt)  # jitter, not a secret
        raise Refused(Reason.BUSY, "the blob store reports conflict after conflict; try again")

    def _is_there(self, digest: str, data: bytes | memoryview) -> bool:
        try:
            found = obstore.head(self._store, digest)
        except FileNotFoundError:
            return False
        if found["size"] != len(data):
            raise StoreError(f"blob {digest[:12]}… has {found['size']} bytes, not {len(data)}")
        if _age_s(found) > RENEWED_AFTER_S:
            self._put(digest, data, mode="overwrite")  # the same bytes, with a new date
        return True

    def put(self, data: bytes | memoryview) -> str:
        digest = spec.bytes_digest(data)
        self.create(digest, data)
        return digest

    def grow(self, name: str) -> None:
        """Objects do not grow."""

    def growing(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get(self, digest: str) -> memoryview:
        with _server(digest), _disk(), tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as spool:
            answer = obstore.get(self._store, digest)
            declared = Declared(digest, answer.meta["size"])
            for part in answer.stream(READ_BYTES):
                declared.take(memoryview(part))
                spool.write(part)
            try:
                declared.checked()
            except Refused as error:
                raise StoreError(f"blob {digest[:12]}… is damaged: {error}") from error
            return memoryview(_mapped(spool, answer.meta["size"]))

    def size(self, digest: str) -> int:
        with _server(digest):
            return int(obstore.head(self._store, digest)["size"])

    def digests(self) -> Iterator[str]:
        return (name for name, _ in self._listed())

    def older(self, than_s: float) -> Iterator[str]:
        return (name for name, age_s in self._listed() if age_s > than_s)

    def delete(self, digest: str) -> None:
        with _server(digest):
            obstore.delete(self._store, digest)

    def free_bytes(self) -> int:
        return shutil.disk_usage(tempfile.gettempdir()).free  # what spools pass through; a bucket has no bound

    def _listed(self) -> Iterator[tuple[str, float]]:
        with _server("list"):
            for page in obstore.list(self._store):
                yield from ((m["path"], _age_s(m)) for m in page if DIGEST.fullmatch(m["path"]))


def _wanting() -> str:
    """What a person may have forgotten. It may come from elsewhere, too, as on a machine in the cloud."""
    absent = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)]
    return f" (not set: {', '.join(absent)})" if absent else ""


def _store(url: str) -> S3Store:
    parts = urlsplit(url)
    options: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - OPTIONS):
        raise UserError(f"{without_secrets(url)}: unknown option {unknown[0]!r}; known: {', '.join(sorted(OPTIONS))}")
    if not parts.netloc or "@" in parts.netloc:
        raise UserError(f"{without_secrets(url)}: expected s3://BUCKET/PREFIX; credentials come from AWS_… variables")
    client: ClientConfig = {"timeout": "60s", "connect_timeout": "5s"}
    endpoint = options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL", "")
    if options.pop("allow_http", os.environ.get("AWS_ALLOW_HTTP", "false")).lower() == "true":
        client["allow_http"] = True
    elif endpoint.startswith("http://"):
        raise UserError(
            f"{without_secrets(url)}: {without_secrets(endpoint)} has no TLS; if that is meant, say allow_http=true in the URL"
            " or AWS_ALLOW_HTTP=true"
        )
    try:
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options=client,
            retry_config={"max_retries": 6, "retry_timeout": TRY_FOR},
            **options,
        )
    except BaseError as error:
        raise UserError(f"{without_secrets(url)}: {_said(error)}{_wanting()}") from None


def _age_s(found: ObjectMeta) -> float:
    age: datetime.timedelta = datetime.datetime.now(datetime.UTC) - found["last_modified"]
    return age.total_seconds()


def _mapped(spool: IO[bytes], size: int) -> bytes | memoryview:
    """All of a spool: its bytes if they are few, else a mapping, which outlives the file."""
    if size <= IN_MEMORY_BYTES:
        spool.seek(0)
        return spool.read()
    spool.flush()
    return memoryview(mmap.mmap(spool.fileno(), size, access=mmap.ACCESS_READ))


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """The local disk that blobs pass through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Refused(Reason.DISK_FULL, f"the coordinator's temporary folder: {error.strerror}") from error


@contextlib.contextmanager
def _server(digest: str) -> Iterator[None]:
    """Absent is UNKNOWN_BLOB; a server that does not answer is BUSY, which callers repeat; all else is the store's."""
    try:
        yield
    except EdgetuneError:
        raise
    except FileNotFoundError as error:
        raise Refused(Reason.UNKNOWN_BLOB, f"no blob {digest[:12]}…") from error
    except BaseError as error:
        raise Refused(Reason.BUSY, f"the blob store does not answer, or says no: {_said(error)}") from error


def _said(error: Exception) -> str:
    """The first line, which names the server and what it said; credentials travel in headers and are not in it."""
    return str(error).strip().partition("\n")[0]
