"""What an encoder does on a CPU between two products: loops over rows.

A product's numbers, and what is added to them, are read once while they are in a core's nearest
cache, where PyTorch's operations pass through memory for each. Loops run on one thread.
"""

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled, summing

Singles = NDArray[np.float32]


@compiled
def add_normed(
    x: Singles, made: Singles, offset: Singles, gain: Singles, shift: Singles, epsilon: np.float32
) -> None:
    """x (rows, out) becomes the norm of x + made + offset; `made` is of no use after that."""
    for row in range(len(x)):
        _add(made[row], offset)
        add_normed_row(x[row], made[row], gain, shift, epsilon)


@compiled
def gelu(made: Singles, offset: Singles) -> None:
    """`made` (rows, out) becomes GELU of made + offset."""
    for row in range(len(made)):
        _add(made[row], offset)
        gelu_row(made[row])


@compiled
def _add(row: Singles, offset: Singles) -> None:
    for at in range(len(row)):
        row[at] += offset[at]


@summing
def add_normed_row(
    x: Singles, row: Singles, gain: Singles, shift: Singles, epsilon: np.float32
) -> None:
    """x becomes the norm of x + row."""
    width = np.float32(len(x))
    total = np.float32(0)
    for at in range(len(x)):
        x[at] += row[at]
        total += x[at]
    mean = total / width
    total = np.float32(0)
    for at in range(len(x)):
        apart = x[at] - mean
        total += apart * apart
    by = np.float32(1) / np.sqrt(total / width + epsilon)
    for at in range(len(x)):
        x[at] = (x[at] - mean) * by * gain[at] + shift[at]


@summing
def gelu_row(row: Singles) -> None:
    """GELU, by an error function that is off by 3e-7 at most (Abramowitz and Stegun, 7.1.28)."""
    one, half = np.float32(1), np.float32(0.5)
    for at in range(len(row)):
        number = row[at]
        x = abs(number) * np.float32(0.7071067811865476)
        d = np.float32(0.0002765672) + x * np.float32(0.0000430638)
        d = np.float32(0.0092705272) + x * (np.float32(0.0001520143) + x * d)
        d = one + x * (np.float32(0.0705230784) + x * (np.float32(0.0422820123) + x * d))
        d *= d
        d *= d
        d *= d
        d *= d
        row[at] = half * (number + abs(number) * (one - one / d))
