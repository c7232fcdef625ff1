"""Where the Triton kernels run in these tests: on the GPU if there is one (marked `gpu`), interpreted otherwise."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("kernels", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("kernels")


# numpy says so wherever an interpreted kernel meets the corners that it is tested on
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(
    params=["cpu", pytest.param("triton", marks=[pytest.mark.gpu] if torch.cuda.is_available() else [])],
)
def path(request, monkeypatch):
    """An implementation under test; its tensors live on `kernel_cases.device(path)`."""
    monkeypatch.setenv("COLLAB_KERNELS", request.param)
    return request.param
