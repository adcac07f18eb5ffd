"""The checks' own arithmetic."""

from tests.faults.check import FORGOTTEN, WINDOW, applied


def test_a_repetition_counts_again_once_its_user_has_had_a_window_of_others() -> None:
    others = list(range(1, WINDOW))  # one fewer than the window
    assert applied(["u"] * (WINDOW + 1), [0, *others, 0])[0] == [0, *others]
    others.append(WINDOW)
    assert applied(["u"] * (WINDOW + 2), [0, *others, 0])[0] == [0, *others, 0]
    assert applied(["u", *["v"] * WINDOW, "u"], [0, *others, 0])[0] == [0, *others]


def test_of_a_user_who_was_forgotten_counts_what_came_later() -> None:
    users = ["u", "v", "u", "u", "u", "u"]
    assert applied(users, [0, 1, 2, FORGOTTEN, 2, 2]) == ([0, 1, 2, 2], [1, 2])
    assert applied(["u", "u"], [0, FORGOTTEN]) == ([0], [])
