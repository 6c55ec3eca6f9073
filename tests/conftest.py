"""Fixtures of all tests."""

import dataclasses
import os
import zlib

import pytest
import torch
from hypothesis import settings

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

# Timings say nothing on a busy machine; fixed examples make a failure repeatable. Interpreted kernels are slow.
settings.register_profile("tlalign", max_examples=10 if INTERPRETS else 40, deadline=None, derandomize=True)
settings.load_profile("tlalign")

if INTERPRETS:
    from triton.runtime.interpreter import interpreter_builder

    # Else a third of the time goes into comparisons that are thrown away, as Triton's debug mode is off.
    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)

# Of `pytest -n`, workers share the processors.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_configure(config: pytest.Config) -> None:
    """Has `pytest -n` keep the tests of a group on one worker."""
    # Not by an option in pyproject.toml, which pytest-benchmark takes for workers that disturb its timings. Workers do
    # not learn what is changed here.
    if hasattr(config, "workerinput"):
        config.option.loadgroup = True
    elif getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that take minutes first."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch with a number that belongs to the test, and prints it."""
    value = zlib.crc32(request.node.nodeid.encode()) % 2**31
    print(f"seed {value}")
    torch.manual_seed(value)
    return value
