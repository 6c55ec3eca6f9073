"""Fixtures of all tests."""

import dataclasses
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before the folder of the tests is on the path, where one of them would pass for the package.
import tlalign  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))  # for benchmarks, which some test

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

# Timings say nothing on a busy machine; fixed examples make a failure repeatable. Interpreted kernels are slow.
settings.register_profile("tlalign", max_examples=10 if INTERPRETS else 40, deadline=None, derandomize=True)
settings.load_profile("tlalign")

if INTERPRETS:
    from triton.runtime import interpreter

    # What takes most of the time otherwise: comparisons that are thrown away, as Triton's debug mode is off ...
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    # ... and replacing Triton's functions at each call of a function in a kernel. Once for a module is enough.
    patch_language, patched_modules = interpreter._patch_lang, set()

    def patch_language_once(function: Callable) -> object:
        if function.__module__ not in patched_modules:
            patched_modules.add(function.__module__)
            patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_language_once

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
