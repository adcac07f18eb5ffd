"""What a user's ratings say of an item through factors: the user's taste, folded in.

Items have factors q and offsets b, users have none. A rating is taken for

    r = level + b_i + d_u + m_u + p_u · q_i + noise,

where a user's level d, mood m and factors p are drawn about zero, p with a variance of one. Of the
rated items j = 0, 1, ... that the user's state remembers (the recent ones, and up to `state.OLDER`
before them, the newest first), with residuals e_j = r_j - level - b_j, the likeliest are

    (d, m, p) = (sum w_j x_j x_j' + diag(ridge))^-1 sum w_j x_j e_j,
    w_j = FADE / (FADE + j),    x_j = (1, exp(-(1 + j) / MOOD), q_j),

where the ridge is the noise's variance over those of d, m and p: the mood of now had less and less
part in what was rated before. The offsets' variance tells how much an item's running bias is to be
damped in this shop (Efron and Morris 1973, "Stein's estimation rule and its competitors: an
empirical Bayes approach"). And an offset knows who rated the item, which a running bias does not:
what it adds to the damped mean of the m ratings that it was fitted to, c, counts as much as these
are of the n that there are now, c (m + damping) / (max(m, n) + damping). What all this adds to the
running bias is believed as far as it held good on newer ratings in training; there the network's
correction starts.

It is biased matrix factorisation (Koren, Bell and Volinsky 2009, "Matrix Factorization Techniques
for Recommender Systems") with users folded in when they are asked for, so that a user whom training
never met is served as any other, and with older ratings counting less. An item that training never
met has factors of zero: of such a rating only level and mood are learnt.

Cost of n rows, r remembered ratings and k factors: r·k² + k³ products each.
"""

import torch
from torch import Tensor, nn

from model.features import ITEM_DAMPING

COLUMNS = (
    "taste_bias",  # stars: the running bias and what is believed of `ADDED`, within 1 to 5
    "taste_level",  # stars that level and mood add to the user's running bias
    "taste_mood",  # stars of the mood
    "item_level",  # stars that this shop's damping, and who rated it, add to the item's
    "taste",  # stars that the factors add
    "taste_known",  # remembered ratings of items with factors
    "taste_strength",  # |p|²
    "item_strength",  # |q|²
)

ADDED = tuple(COLUMNS.index(name) for name in ("taste_level", "item_level", "taste"))
RUNNING = ("bias", "user_bias", "item_bias", "item_ratings")  # features that it reads
FADE = 20.0  # ratings after which one counts half
MOOD = 7.0  # ratings after which a mood has come down to 1 / e


class Taste(nn.Module):
    """Factors of items by bucket; bucket 0 is no item."""

    factors: Tensor  # (buckets, k)
    offsets: Tensor  # (buckets,) stars
    corrections: Tensor  # (buckets,) stars that offsets add to damped means
    ratings: Tensor  # (buckets,) that offsets were fitted to
    level: Tensor  # () stars: the mean of all ratings
    ridge: Tensor  # (2 + k,) ratings' worth of no level, no mood and no taste
    damping: Tensor  # () the same of no offset
    trust: Tensor  # (3,) how much of `ADDED` is believed

    def __init__(self, buckets: int, count: int) -> None:
        super().__init__()
        self.register_buffer("factors", torch.zeros(buckets, count))
        self.register_buffer("offsets", torch.zeros(buckets))
        self.register_buffer("corrections", torch.zeros(buckets))
        self.register_buffer("ratings", torch.zeros(buckets))
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("ridge", torch.ones(2 + count))
        self.register_buffer("damping", torch.tensor(ITEM_DAMPING))
        self.register_buffer("trust", torch.zeros(len(ADDED)))

    def forward(
        self, item: Tensor, recents: Tensor, rating: Tensor, rated: Tensor, running: Tensor
    ) -> Tensor:
        """Columns (n, 8).

        Args:
            item: (n) buckets.
            recents: (n, r) buckets, the newest first.
            rating: (n, r) stars; anything where there are none.
            rated: (n, r) 1 where there are stars, else 0.
            running: (n, 4) the features `RUNNING`; nan: unknown, taken for 0.
        """
        bias, user_bias, item_bias, count = torch.nan_to_num(running).unbind(1)
        factors = self.factors[recents]  # (n, r, k)
        residual = (rating - self.level - self.offsets[recents]) * rated
        age = rated.cumsum(1)  # (n, r) 1 and up
        weight = rated * FADE / (FADE + age - 1)
        lately = torch.stack([torch.ones_like(age), torch.exp(-age / MOOD)], 2)
        known = torch.cat([lately, factors], 2)  # (n, r, 2 + k)
        weighted = (known * weight[..., None]).transpose(1, 2)
        gram = weighted @ known + torch.diag(self.ridge)
        person = torch.linalg.solve(gram, weighted @ residual[..., None])[..., 0]
        level, mood, person = person[:, 0], person[:, 1], person[:, 2:]  # (n), (n), (n, k)
        wanted = self.factors[item]  # (n, k)
        count, fitted = torch.expm1(count), self.ratings[item]
        more = item_bias * (ITEM_DAMPING - self.damping) / (count + self.damping)
        same = (fitted + self.damping) / (torch.maximum(count, fitted) + self.damping)
        said = torch.stack(
            [
                bias,
                level + mood - user_bias,
                mood,
                more + self.corrections[item] * same,
                (person * wanted).sum(1),
                (rated * factors.any(2)).sum(1),
                person.square().sum(1),
                wanted.square().sum(1),
            ],
            1,
        )
        said[:, 0] = believed(bias, said, self.trust)
        return said


def believed(bias: Tensor, said: Tensor, trust: Tensor) -> Tensor:
    """The first column (n): of running biases (n) and the other columns in `said` (n, 8)."""
    return (bias + said[:, ADDED] @ trust).clamp(1, 5)
