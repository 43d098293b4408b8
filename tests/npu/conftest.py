"""Without an NPU the checks run in its emulation."""

import os

import pytest


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> None:
    if os.environ.get("TEST_DEVICE") == "cpu":
        request.getfixturevalue("ascend_emulation")
