"""A package says of each of its modules what it is for, so that a reader knows where to begin."""

import re
from importlib import import_module
from pkgutil import iter_modules

import pytest


@pytest.mark.parametrize("name", ["model", "streams", "trainer"])
def test_each_module_stands_in_the_words_of_its_package(name: str) -> None:
    package = import_module(name)
    named = re.findall(r"`(\w+)`", package.__doc__ or "")
    assert sorted(named) == sorted({*named}), "named twice"
    assert {*named} == {module.name for module in iter_modules(package.__path__)}
