"""The time that work takes, on machines that others use too."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long some work takes, done when it is done on the device.

    With one thread on a CPU this is the process's processor time (that of a tokenizer's threads
    too), which is what the clock would show were the cores idle otherwise. Elsewhere it is the
    clock: threads that wait for each other use the processor, and a GPU's work does not.
    """
    now = reader(device)
    began = now()
    work()
    return now() - began


def reader(device: torch.device) -> Callable[[], float]:
    """What tells the time by which all work handed to the device is done."""
    if by_processor(device):
        return time.process_time
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def by_processor(device: torch.device) -> bool:
    """Whether `seconds` is processor time."""
    return device.type == "cpu" and torch.get_num_threads() == 1
