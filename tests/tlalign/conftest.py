"""Fixtures of the tests of the training package."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for training.py, which the tests share


@pytest.fixture
def one_thread():
    """Tensors of a few kilobytes: more threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
