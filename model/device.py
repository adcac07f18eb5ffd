"""Where tensors live."""

import os

import torch

from model.exceptions import DeviceError


def find(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is cuda when present, otherwise the CPU.

    Of processes that `torchrun` started, each has the GPU of its number on the machine. Raises
    DeviceError when it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {name!r} cannot be used: {reason}; set auto or cpu") from error
    return device
