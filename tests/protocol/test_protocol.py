"""The protocol holds in every interleaving, and without any one of its protections it does not.

`pytest -rP tests/protocol` prints how many worlds were looked at, and a shortest way to each break.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.protocol.model import Model, Protections, begin, broken, broken_at_rest
from tests.protocol.search import search, settle

TWICE = "the journal is not each input once and in order"
STATES = "states are"


@pytest.mark.parametrize(
    ("events", "faults"),
    [(2, 1), (3, 1), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_nothing_breaks_whatever_happens_in_whatever_order(events: int, faults: int) -> None:
    found = search(Model(Protections()), begin(events, faults))
    print(f"{events} events, {faults} faults: {found}")
    assert not found.reason, str(found)
    assert found.rests > 1


def test_workers_that_share_a_transactional_id_break_nothing_either() -> None:
    """They fence each other; one of them gives up."""
    found = search(Model(Protections(), slots=(0, 0)), begin(2, 1))
    print(found)
    assert not found.reason, str(found)


@pytest.mark.parametrize(
    ("protection", "reason"),
    [
        ("guard", TWICE),
        ("fence", "a fenced worker's write changed the store"),
        ("order", "the header says input 1, the journal before it does not"),
        ("recovery", STATES),
        ("count", STATES),
        ("stable", TWICE),
        ("skip", STATES),
    ],
)
def test_each_protection_is_needed(protection: str, reason: str) -> None:
    weakened = replace(Protections(), **{protection: False})
    found = search(Model(weakened), begin(2, 1), reason)
    print(f"without {protection}: {found}")
    assert reason in found.reason


# -- more workers, events and faults, at random ----------------------------------------------------

WORKERS = 3
FAULTS = 1_000  # more than there are steps


class Protocol(RuleBasedStateMachine):
    """Workers and Kafka in any order; anything may go wrong at any time."""

    slots = (0, 1, 2)
    most_events = 7

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(Protections(), self.slots)
        self.world = begin(2, FAULTS, WORKERS)

    @rule(steps=st.lists(st.integers(0, 11), min_size=1, max_size=12))
    def work(self, steps: list[int]) -> None:
        for step in steps:
            choices = list(self.model.work(self.world))
            if choices:
                self.world = choices[step % len(choices)][1]
                assert broken(self.world) == ""

    @rule(at=st.integers(0, WORKERS - 1), count=st.integers(1, 12))
    def work_alone(self, at: int, count: int) -> None:
        """The other workers sleep."""
        for _ in range(count):
            choices = [
                after
                for name, after in self.model.work(self.world)
                if name.startswith("marker") or name.endswith(f" {at}")
            ]
            if choices:
                self.world = choices[-1]
                assert broken(self.world) == ""

    @rule(which=st.integers(0, 20))
    def fail(self, which: int) -> None:
        choices = list(self.model.faults(self.world))
        self.world = choices[which % len(choices)][1]

    @rule(at=st.integers(0, WORKERS - 1))
    def rebalance(self, at: int) -> None:
        names = dict(self.model.faults(self.world))
        self.world = names[f"rebalance to {at}"]

    @precondition(lambda self: self.world.end < self.most_events)
    @rule()
    def produce(self) -> None:
        self.world = self.world._replace(end=self.world.end + 1)

    @rule()
    def rest(self) -> None:
        self.world = settle(self.model, self.world)
        assert broken_at_rest(self.world) == ""

    @invariant()
    def nothing_is_broken(self) -> None:
        assert broken(self.world) == ""

    def teardown(self) -> None:
        self.rest()


def test_nothing_breaks_at_random() -> None:
    run_state_machine_as_test(Protocol, settings=settings(max_examples=300, stateful_step_count=40))
