"""Boosted regression trees as tensors, so that they are served as the rest of a network is.

A tree of depth d is a full binary tree in heap order: node k has the children 2k + 1 (left) and
2k + 2 (right). Where a tree ends early, its leaf's value stands in all nodes below. A row goes left
where its feature is at most the threshold; each node says which way a missing value goes.

Cost of n rows and T trees: 3·d·n·T gathered numbers.
"""

import torch
from torch import Tensor, nn


class Trees(nn.Module):
    """T trees of one depth; a row's value is the sum over all trees."""

    feature: Tensor  # (T, 2^d - 1) columns; those of nodes where missing goes right, F further on
    threshold: Tensor  # (T, 2^d - 1)
    value: Tensor  # (T, 2^(d+1) - 1) stars: of leaves, and of inner nodes the mean of what passes

    def __init__(self, count: int, depth: int) -> None:
        super().__init__()
        inner = 2**depth - 1
        self.depth = depth
        self.register_buffer("feature", torch.zeros(count, inner, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(count, inner))
        self.register_buffer("value", torch.zeros(count, 2 * inner + 1))

    def forward(self, features: Tensor) -> Tensor:
        """Values (n) of rows of features (n, F); nan: missing."""
        nodes = self._paths(features)[-1]
        return self.value.flatten()[nodes + self._starts(self.value)].sum(1)

    def attributions(self, features: Tensor) -> Tensor:
        """What each feature (n, F) added to a row's value, the values of all roots aside.

        The change of a node's value along the path is the node's feature's: Saabas 2014,
        "Interpreting random forests".
        """
        columns = features.shape[1]
        added = torch.zeros_like(features)
        paths = self._paths(features)
        values = [self.value.flatten()[each + self._starts(self.value)] for each in paths]
        for level, nodes in enumerate(paths[:-1]):
            asked = self.feature.flatten()[nodes + self._starts(self.feature)] % columns
            added.scatter_add_(1, asked, values[level + 1] - values[level])
        return added

    def _paths(self, features: Tensor) -> list[Tensor]:
        """The nodes (n, T) that rows pass, from the roots to the leaves."""
        missing = torch.isnan(features)
        known = torch.cat(  # (n, 2 F): a missing value goes left in the first half, right after
            [features.masked_fill(missing, -torch.inf), features.masked_fill(missing, torch.inf)], 1
        )
        nodes = torch.zeros(len(features), len(self.feature), dtype=torch.int64).to(features.device)
        paths = [nodes]
        starts = self._starts(self.feature)
        for _ in range(self.depth):
            at = nodes + starts
            right = known.gather(1, self.feature.flatten()[at]) > self.threshold.flatten()[at]
            nodes = 2 * nodes + 1 + right
            paths.append(nodes)
        return paths

    @staticmethod
    def _starts(table: Tensor) -> Tensor:
        """Where each tree's (T) numbers begin in a flattened table."""
        return torch.arange(len(table), device=table.device) * table.shape[1]
