from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.fake_cuda import device


@pytest.fixture
def watch() -> Generator[device.Watch, None, None]:
    """A device "cuda", for the length of a test."""
    if not device.can_fake():
        pytest.skip("needs a build of torch without CUDA, and a C++ compiler")
    with device.fake_cuda() as seen:
        yield seen
