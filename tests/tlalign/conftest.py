"""Fixtures of the tests of the training package."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Tensors of a few kilobytes: more threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
