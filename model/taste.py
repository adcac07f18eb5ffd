"""What a user's ratings say of an item through factors: the user's taste, folded in.

Items have factors q and offsets b, users have none. A rating is taken for

    r = level + b_i + d_u + p_u · q_i + noise,

where a user's level d and factors p are drawn about zero, p with a variance of one. Of the rated
items j that the user's state remembers (the recent ones, and up to `state.OLDER` before them, the
newest first), with residuals e_j = r_j - level - b_j and x_j = (1, q_j), the likeliest are

    (d, p) = (sum w_j x_j x_j' + diag(ridge))^-1 sum w_j x_j e_j,    w_j = FADE / (FADE + j),

where the ridge is the noise's variance over those of d and p. The offsets' variance tells how much
an item's running bias is to be damped in this shop (Efron and Morris 1973, "Stein's estimation rule
and its competitors: an empirical Bayes approach"). It is biased matrix factorisation
(Koren, Bell and Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems") with
users folded in when they are asked for, so that a user whom training never met is served as any
other, and with older ratings counting less: moods and scales drift. An item that training never met
has factors of zero: of such a rating only the level is learnt.

Cost of n rows, r remembered ratings and k factors: r·k² + k³ products each.
"""

import torch
from torch import Tensor, nn

from model.features import ITEM_DAMPING

COLUMNS = (
    "taste_level",  # stars that the level adds to the user's running bias
    "item_level",  # stars that this shop's damping adds to the item's
    "taste",  # stars that the factors add
    "taste_known",  # remembered ratings of items with factors
    "taste_strength",  # |p|²
    "item_strength",  # |q|²
)

RUNNING = ("user_bias", "item_bias", "item_ratings")  # features that it reads
FADE = 20.0  # ratings after which one counts half


class Taste(nn.Module):
    """Factors of items by bucket; bucket 0 is no item."""

    factors: Tensor  # (buckets, k)
    offsets: Tensor  # (buckets,) stars
    level: Tensor  # () stars: the mean of all ratings
    ridge: Tensor  # (1 + k,) ratings' worth of no level, and of no taste
    damping: Tensor  # () the same of no offset

    def __init__(self, buckets: int, count: int) -> None:
        super().__init__()
        self.register_buffer("factors", torch.zeros(buckets, count))
        self.register_buffer("offsets", torch.zeros(buckets))
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("ridge", torch.ones(1 + count))
        self.register_buffer("damping", torch.tensor(ITEM_DAMPING))

    def forward(
        self, item: Tensor, recents: Tensor, rating: Tensor, rated: Tensor, running: Tensor
    ) -> Tensor:
        """Columns (n, 6).

        Args:
            item: (n) buckets.
            recents: (n, r) buckets, the newest first.
            rating: (n, r) stars; anything where there are none.
            rated: (n, r) 1 where there are stars, else 0.
            running: (n, 3) the features `RUNNING`; nan: unknown, taken for 0.
        """
        user_bias, item_bias, count = torch.nan_to_num(running).unbind(1)
        factors = self.factors[recents]  # (n, r, k)
        residual = (rating - self.level - self.offsets[recents]) * rated
        weight = rated * FADE / (FADE + rated.cumsum(1) - 1)
        known = torch.cat([torch.ones_like(factors[..., :1]), factors], 2)  # (n, r, 1 + k)
        weighted = (known * weight[..., None]).transpose(1, 2)
        gram = weighted @ known + torch.diag(self.ridge)
        person = torch.linalg.solve(gram, weighted @ residual[..., None])[..., 0]
        wanted, person, level = self.factors[item], person[:, 1:], person[:, 0]  # (n, k), (n)
        more = (ITEM_DAMPING - self.damping) / (torch.expm1(count) + self.damping)
        return torch.stack(
            [
                level - user_bias,
                item_bias * more,
                (person * wanted).sum(1),
                (rated * factors.any(2)).sum(1),
                person.square().sum(1),
                wanted.square().sum(1),
            ],
            1,
        )
