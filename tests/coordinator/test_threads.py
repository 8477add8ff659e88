from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.stores.files import FileBlobs
from coordinator.threads import on
from wire import spec


def test_a_caller_that_is_cancelled_again_and_again_waits_for_its_thread() -> None:
    let_go, ended = threading.Event(), list[bool]()

    def work() -> None:
        let_go.wait(10)
        ended.append(True)
        raise OSError("nobody hears of it")

    async def scene() -> None:
        with ThreadPoolExecutor(1) as disk:
            caller = asyncio.create_task(on(disk, work))
            for _ in range(3):
                await asyncio.sleep(0.05)
                caller.cancel()
            await asyncio.sleep(0.05)
            assert not caller.done() and not ended
            let_go.set()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert ended == [True]

    asyncio.run(scene())


def test_a_blob_being_written_keeps_its_file_until_the_write_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the number of the file would be another blob's by the time of the write."""
    began, let_go, written = threading.Event(), threading.Event(), list[int]()
    real = os.write

    def slow(handle: int, data: bytes) -> int:
        began.set()
        let_go.wait(10)
        written.append(real(handle, data))  # OSError where it has been closed
        return written[-1]

    async def scene() -> None:
        blobs, data = FileBlobs(tmp_path), bytes(100)
        with ThreadPoolExecutor(1) as disk:

            async def upload() -> None:
                with blobs.writer(spec.bytes_digest(data), len(data)) as writer:
                    await on(disk, writer.write, data)

            monkeypatch.setattr(os, "write", slow)
            caller = asyncio.create_task(upload())
            await asyncio.to_thread(began.wait, 10)
            caller.cancel()
            await asyncio.sleep(0.05)
            let_go.set()
            with contextlib.suppress(asyncio.CancelledError):
                await caller
        assert written == [100]
        assert list(blobs.digests()) == []

    asyncio.run(scene())
