"""Fixtures of all tests."""

import zlib

import pytest
import torch
from hypothesis import settings

# Timings say nothing on a busy machine; fixed examples make a failure repeatable.
settings.register_profile("tlalign", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("tlalign")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch with a number that belongs to the test, and prints it."""
    value = zlib.crc32(request.node.nodeid.encode()) % 2**31
    print(f"seed {value}")
    torch.manual_seed(value)
    return value
