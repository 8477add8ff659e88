from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_client.transport import Connection
from tests.processes import CoordinatorProcess


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path_factory.mktemp("store")) as process:
        yield process


@pytest.fixture
def connection(coordinator: CoordinatorProcess) -> Iterator[Connection]:
    with Connection(coordinator.address) as opened:
        yield opened
