"""What the op's tests share."""

import pytest
import torch


@pytest.fixture
def set_threads():
    """torch's own. A test process has one thread (../conftest.py), and has it again afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
