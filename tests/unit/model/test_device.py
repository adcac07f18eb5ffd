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


def test_each_process_of_a_launcher_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)  # there may be no such device
    assert device.find("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.find("auto") == device.find("cuda") == torch.device("cuda:1")
    assert device.find("cuda:0") == torch.device("cuda:0")
    assert device.find("cpu") == torch.device("cpu")
