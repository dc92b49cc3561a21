"""Settings of the whole suite: one thread, no gradients left over, and a generator that every test starts afresh."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "a test left gradients switched off"
