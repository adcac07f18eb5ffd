"""What a user's ratings say of an item through factors: the user's taste, folded in.

Items have factors q and offsets b, users have none. Of the rated items j that the user's state
remembers (the recent ones, and up to `state.OLDER` before them), with residuals
e_j = r_j - level - b_j - user bias, the user's factors are a ridge regression's,

    p = (sum q_j q_j' + RIDGE I)^-1 sum q_j e_j,

and the taste for an item i is p · q_i: biased matrix factorisation (Koren, Bell and Volinsky 2009,
"Matrix Factorization Techniques for Recommender Systems") with users folded in when they are asked
for, so that a user whom training never met is served as any other. An item that training never met
has factors of zero: it says nothing, and nothing is said of it.

Cost of n rows, r remembered ratings and k factors: r·k² + k³ products each.
"""

import torch
from torch import Tensor, nn

COLUMNS = ("taste", "taste_known", "taste_strength", "item_strength")
"""Stars that the taste adds; ratings that it is made from; |p|²; |q|²."""

RIDGE = 5.0  # ratings' worth of no taste at all


class Taste(nn.Module):
    """Factors of items by bucket; bucket 0 is no item."""

    factors: Tensor  # (buckets, k)
    offsets: Tensor  # (buckets,) stars
    level: Tensor  # () stars: the mean of all ratings

    def __init__(self, buckets: int, count: int) -> None:
        super().__init__()
        self.register_buffer("factors", torch.zeros(buckets, count))
        self.register_buffer("offsets", torch.zeros(buckets))
        self.register_buffer("level", torch.zeros(()))

    def forward(
        self, item: Tensor, recents: Tensor, rating: Tensor, rated: Tensor, user_bias: Tensor
    ) -> Tensor:
        """Columns (n, 4).

        Args:
            item: (n) buckets.
            recents: (n, r) buckets.
            rating: (n, r) stars; anything where there are none.
            rated: (n, r) 1 where there are stars, else 0.
            user_bias: (n) stars; nan: unknown, taken for 0.
        """
        factors = self.factors[recents]  # (n, r, k)
        usual = self.level + self.offsets[recents] + torch.nan_to_num(user_bias)[:, None]
        residual = (rating - usual) * rated
        weighted = (factors * rated[..., None]).transpose(1, 2)  # (n, k, r)
        ridge = RIDGE * torch.eye(factors.shape[2], device=factors.device)
        person = torch.linalg.solve(weighted @ factors + ridge, weighted @ residual[..., None])
        person, wanted = person[..., 0], self.factors[item]  # (n, k) each
        known = rated * factors.any(2)
        return torch.stack(
            [
                (person * wanted).sum(1),
                known.sum(1),
                person.square().sum(1),
                wanted.square().sum(1),
            ],
            1,
        )
