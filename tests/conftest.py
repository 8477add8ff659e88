from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("edgetune", deadline=None, max_examples=200, derandomize=True)
settings.load_profile("edgetune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden files anew (a wire format change)")


@pytest.fixture
def rewrite_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-golden"))
