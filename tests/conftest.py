"""Settings of every test: many tiny problems, for which threads cost more than they give."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, restored after a test that asks for more."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
