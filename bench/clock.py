"""The time that work takes, on machines that others use too."""

import time
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import torch

from streams.config import ModelsConfig


def add_options(parser: ArgumentParser) -> None:
    """Where and in how many threads torch works: `--device` and `--threads`."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--threads",
        type=int,
        default=ModelsConfig().threads,
        help="torch threads, by default those of a worker; 0: as torch decides",
    )


def take_threads(count: int) -> None:
    """Have torch work in so many threads; 0: as it decides."""
    if count:
        torch.set_num_threads(count)


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
