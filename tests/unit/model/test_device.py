"""Where tensors live."""

import pytest
import torch

from model import device
from model.exceptions import DeviceError


def test_auto_is_cuda_when_present() -> None:
    assert device.find("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.find("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["toaster", "cuda:99", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(DeviceError, match="set auto or cpu"):
        device.find(name)
