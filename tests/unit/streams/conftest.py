from collections.abc import Iterator

import pytest

from tests.unit.streams.looped import World, scripted


@pytest.fixture
def world() -> Iterator[World]:
    with scripted() as made:
        yield made
