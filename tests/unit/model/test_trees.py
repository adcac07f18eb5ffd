"""Trees computed by hand."""

import torch

from model.trees import Trees

NAN = float("nan")


def _tree() -> Trees:
    """x0 <= 1, missing left: then x1 <= 5, missing right; else a leaf."""
    trees = Trees(1, 2)
    trees.feature[0] = torch.tensor([0, 1 + 2, 0])  # two features: 1 + 2 is x1 with missing right
    trees.threshold[0] = torch.tensor([1.0, 5.0, torch.inf])
    trees.value[0] = torch.tensor([0.5, 0.25, 3.0, -1.0, 1.0, 3.0, 3.0])
    return trees


def test_rows_go_down_to_their_leaf() -> None:
    rows = torch.tensor([[1.0, 5.0], [1.0, 6.0], [2.0, 0.0]])
    assert _tree()(rows).tolist() == [-1.0, 1.0, 3.0]


def test_a_missing_value_goes_the_way_that_its_node_says() -> None:
    rows = torch.tensor([[NAN, 5.0], [0.0, NAN], [NAN, NAN]])
    assert _tree()(rows).tolist() == [-1.0, 1.0, 1.0]


def test_values_of_trees_are_added() -> None:
    one, two = _tree(), Trees(2, 2)
    for name in ("feature", "threshold", "value"):
        getattr(two, name)[:] = getattr(one, name)
    rows = torch.tensor([[1.0, 5.0], [2.0, 0.0]])
    assert two(rows).tolist() == [-2.0, 6.0]


def test_attributions_are_the_steps_of_the_path() -> None:
    rows = torch.tensor([[1.0, 5.0], [2.0, 0.0]])
    added = _tree().attributions(rows)
    assert added.tolist() == [[0.25 - 0.5, -1.0 - 0.25], [3.0 - 0.5, 0.0]]
    assert torch.allclose(added.sum(1) + 0.5, _tree()(rows))


def test_none_trees_say_nothing() -> None:
    assert Trees(0, 3)(torch.zeros(2, 4)).tolist() == [0.0, 0.0]
