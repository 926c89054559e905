import pytest
import torch
from hypothesis import settings

# Examples take milliseconds or a compilation; a shared machine makes deadlines a lottery.
settings.register_profile("gradfilter", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("gradfilter")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
