"""The fit of the fused network, in three stages, on the features and what tastes say.

The columns of a taste (`model.taste`, `trainer.factors`) are told of each row by factors of older
rows. All stages read them; the network that serves has the factors of all rows.

1. A ridge regression of rating − bias on the standardised features (`trainer.ridge`). It has one
   answer, needs few rows, and how much it is shrunk is chosen by forward chaining over time, so
   that it is hardly ever worse than the bias. It becomes the network's linear path.
2. The network on what is left: cross entropy and squared error of the mean, AdamW, early stopping
   on validation. How much of it is believed is fitted on validation too, from nothing to all. Where
   validation has few rows, spans before it are asked as well, each by a network of older rows: of a
   few hundred rows alone, the best of twenty epochs is best by chance. Where there are several
   members, they differ in their start and in the rows they weigh (bagging).
3. Boosted trees of rating − bias (`trainer.boost`). What the network says and what the trees say
   are added up with shares that validation chooses, near a half each where it can say little.

For service all are fitted once more on all rows, with what was chosen.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.distribution import tilt
from model.network import FusedNetwork, Inputs, Member, NetworkConfig, Tensors, tensors
from model.taste import ADDED, COLUMNS, RUNNING, Taste, believed
from model.trees import Trees
from trainer import boost, factors, ridge
from trainer.boost import Grown
from trainer.config import FitConfig
from trainer.exceptions import TrainerError
from trainer.metrics import Floats, rmse
from trainer.rates import schedule
from trainer.text import soft_labels

Rows = NDArray[np.int64]  # row numbers
OnEpoch = Callable[[int, float], None]
"""Called with the epochs done and the validation RMSE (nan in a refit)."""

_CHAIN = (0.4, 0.55, 0.7, 0.85, 1.0)  # shares of the train rows at which a fold of the chain ends
_LEAST_KNOWN = 0.005  # share of train rows in which a feature must be known to be used
_TAIL = 0.005  # beyond these quantiles of the train rows a feature is clipped
_LEAST_DEVIATION = 1e-4  # a feature that varies less is constant
_SPANS = 3  # at most, that choose epochs and belief; each takes a network of its own
_ENOUGH = 5_000  # rows to choose by, at which no more spans are asked
_WARM_UP = 0.1  # of all steps
_EVALUATED = 4_096  # rows at a time
# Before validation has said anything. That of the second stage was tuned by forward chaining on
# older rows of Musical Instruments and Gift Cards: to ask for proof threw away what it had found.
_BELIEF = 0.75  # of the second stage's correction
_SHARES = (0.5, 0.5)  # of network and trees
_SHARE_DEVIATION = 0.25  # how far from these they may be expected to lie
_LEAST_VARIANCE = 1e-9  # of what is left: in a shop of one rating nothing may be


@dataclass(frozen=True)
class Start:
    """A fitted network to start from."""

    network: FusedNetwork
    same_shop: bool  # else its users and items are others, whatever their ids


@dataclass(frozen=True)
class Fitted:
    """A network and what validation chose for it."""

    network: FusedNetwork
    penalty: float  # of the ridge regression
    epochs: int  # passes of the second stage; 0: it taught nothing
    belief: float  # share of the second stage's correction that is kept
    grown: Grown | None  # how trees are to grow; None: there are none
    shares: tuple[float, float]  # of what the network and the trees say
    carried: Mapping[str, int]  # weights that it started from, by part
    errors: tuple[float, ...]  # RMSE of what is asked for, after each epoch


def fit(
    network_config: NetworkConfig,
    inputs: Inputs,
    rating: Floats,
    train: Rows,
    validation: Rows,
    config: FitConfig,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch,
    start: Start | None = None,
) -> Fitted:
    """Fit a network on `train` and choose on `validation`, and where that is short, before it.

    Args:
        network_config: sizes.
        inputs: of n rows.
        rating: (n) true ratings.
        train: row numbers, oldest first.
        validation: row numbers, all later.
        config: the fit's settings.
        seed: of starts, weights and orders.
        device: that trains.
        on_epoch: called after each epoch.
        start: where the second stage starts; it must not have met rows from `validation` on.
    """
    # A start may have met what comes before validation.
    spans = [(train, validation)] if start else _spans(train, validation)
    begun = [_begin(network_config, inputs, rating, *span, seed) for span in spans]
    last = begun[-1]
    network = last.network
    truth = np.concatenate([rating[each.asked] for each in begun])

    def told() -> Floats:
        return np.concatenate([mean(each.network, each.inputs, each.asked) for each in begun])

    linear = told()
    carried = carry(start, network) if start else {}
    best, best_epoch, at_best = _copy(network), 0, told()
    errors: list[float] = [rmse(truth, at_best)]
    networks = (
        _epochs(each.network, each.inputs, rating, each.rows, config, seed, device)
        for each in begun
    )
    for epoch, *_ in zip(*networks, strict=True):
        said = told()
        errors.append(rmse(truth, said))
        on_epoch(epoch, errors[-1])
        if errors[-1] < min(errors[:-1]):
            best, best_epoch, at_best = _copy(network), epoch, said
        elif epoch - best_epoch >= config.patience:
            break
    network.load_state_dict(best)
    belief = _believe(at_best - linear, truth - linear)
    _keep(network, belief, last.intercept)
    network.eval()
    grown, shares = None, (1.0, 0.0)
    if config.trees:
        grown, shares = _add_trees(last, rating, seed)
    _fold(network, last.taste)
    return Fitted(
        network, last.penalty, best_epoch, belief, grown, shares, carried, tuple(errors[1:])
    )


def refit(
    fitted: Fitted,
    inputs: Inputs,
    rating: Floats,
    rows: Rows,
    config: FitConfig,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch,
    start: Start | None = None,
) -> FusedNetwork:
    """The same fit on all of `rows`, from the same start, with what `fit` chose.

    Raises TrainerError where it comes to no number: nobody judges this network any more.
    """
    torch.manual_seed(seed)
    bare = fitted.network.config.model_copy(update={"trees": 0})
    none = np.empty(0, np.int64)
    taste, plain, inputs = _tasted(bare, inputs, rating, rows, none, seed)
    network = _prepared(plain, inputs, rating, rows)
    intercept = _fit_linear(network, inputs, rating, rows, fitted.penalty)
    if start is not None:
        carry(start, network)
    if fitted.epochs:
        for epoch in _epochs(network, inputs, rating, rows, config, seed, device):
            on_epoch(epoch, math.nan)
            if epoch == fitted.epochs:
                break
    _keep(network, fitted.belief, intercept)
    network.eval()
    if fitted.grown is not None:
        target = _residual(network, inputs, rating, rows)
        trees = boost.grow(inputs.features[rows], target, fitted.grown, seed)
        if trees is not None:
            _plant(network, trees, fitted.shares)
    _fold(network, taste)
    if not all(each.isfinite().all() for each in network.state_dict().values()):
        raise TrainerError(
            "the network came to no number when it was fitted once more, to all rows: lower "
            "trainer.fit.learning_rate, or set trainer.fit.refit to false"
        )
    return network


@dataclass(frozen=True)
class _Begun:
    """A network after the first stage."""

    network: FusedNetwork
    taste: Taste | None
    inputs: Inputs  # with what the taste says
    rows: Rows  # that it learns from
    asked: Rows  # later ones, that it is asked for
    target: Floats  # of `rows`: what the bias leaves
    penalty: float
    intercept: float


def _begin(
    config: NetworkConfig, inputs: Inputs, rating: Floats, rows: Rows, asked: Rows, seed: int
) -> _Begun:
    torch.manual_seed(seed)
    taste, plain, inputs = _tasted(config, inputs, rating, rows, asked, seed)
    network = _prepared(plain, inputs, rating, rows)
    target = _residual(network, inputs, rating, rows)
    penalty = ridge.choose(_design(network, inputs, rows), target, _ends(rows))
    intercept = _fit_linear(network, inputs, rating, rows, penalty)
    return _Begun(network, taste, inputs, rows, asked, target, penalty, intercept)


def _add_trees(
    begun: _Begun, rating: Floats, seed: int
) -> tuple[Grown | None, tuple[float, float]]:
    """Grow trees beside the network; how they grew, and the shares of what both say.

    None and the network's whole share where trees say nothing.
    """
    network, asked = begun.network, begun.asked
    features, later = begun.inputs.features[begun.rows], begun.inputs.features[asked]
    how = boost.choose(features, begun.target, _ends(begun.rows), seed)
    trees = boost.grow(features, begun.target, how, seed)
    if trees is None:
        return None, (1.0, 0.0)
    bias = later[:, network.config.bias_column].astype(np.float64)
    said = np.stack([mean(network, begun.inputs, asked) - bias, boost.values(trees, later)])
    shares = _shared(said, rating[asked] - bias)
    _plant(network, trees, shares)
    return how, shares


def _spans(train: Rows, validation: Rows) -> list[tuple[Rows, Rows]]:
    """Rows to learn from and later rows to be asked for: train and validation come last.

    Where validation has few rows, as many before it are asked for too, and those before these.
    """
    spans, length = [(train, validation)], len(validation)
    while len(spans) < _SPANS and len(spans) * length < _ENOUGH:
        before, _ = spans[0]
        if len(before) <= 2 * length:
            break
        spans.insert(0, (before[:-length], before[-length:]))
    return spans


def _ends(rows: Rows) -> list[int]:
    return [int(len(rows) * share) for share in _CHAIN]


def _tasted(
    config: NetworkConfig,
    inputs: Inputs,
    rating: Floats,
    rows: Rows,
    later: Rows,
    seed: int,
) -> tuple[Taste | None, NetworkConfig, Inputs]:
    """The taste of `rows`, and inputs whose features end in what tastes say.

    Of `rows` (oldest first) each is told by factors of older ones, `later` rows by those of all;
    the network that is fitted takes it all for features.
    """
    if not config.factors:
        return None, config, inputs
    taste = factors.fit_taste(config, inputs, rating, rows, seed)
    said = np.full((len(inputs), len(COLUMNS)), np.nan, np.float32)
    ahead = factors.told_ahead(config, inputs, rating, rows, seed)
    bias = inputs.features[rows, config.running_columns[RUNNING.index("bias")]]
    taste.trust.copy_(_trusted(ahead, bias, rating[rows]))
    known = torch.from_numpy(np.nan_to_num(ahead))
    ahead[:, 0] = believed(torch.from_numpy(bias), known, taste.trust).numpy()
    said[rows], said[later] = ahead, factors.told(taste, config, inputs, later)
    plain = config.model_copy(update={"features": config.columns, "factors": 0})
    return taste, plain, replace(inputs, features=np.concatenate([inputs.features, said], 1))


def _trusted(ahead: NDArray[np.float32], bias: NDArray[np.float32], rating: Floats) -> Tensor:
    """How much to believe of what tastes said of rows (n) that they had not met, (n, 8)."""
    told = ~np.isnan(ahead[:, 0])
    if not told.any():
        return torch.zeros(len(ADDED))
    said = ahead[told][:, ADDED].T.astype(np.float64)
    trust = np.maximum(_about((1.0,) * len(ADDED), said, (rating - bias)[told]), 0)
    return torch.from_numpy(trust.astype(np.float32))


def _fold(network: FusedNetwork, taste: Taste | None) -> None:
    if taste is not None:
        network.fold(taste.to(network.prior.device))


@torch.no_grad()
def carry(start: Start, network: FusedNetwork) -> dict[str, int]:
    """Copy what another network has learnt beyond its linear path; how many weights, by part.

    Parts of another size stay as they are, as do users and items where the shop is another.
    """
    theirs = dict(start.network.named_parameters())
    pairs = [  # names are like members.0.users.table.weight
        (name.split(".")[2], weights, theirs.get(name))
        for name, weights in network.named_parameters()
    ]
    left = {"linear"} if start.same_shop else {"linear", "users", "items"}
    left |= {part for part, ours, found in pairs if found is None or found.shape != ours.shape}
    carried: Counter[str] = Counter()
    for part, weights, found in pairs:
        if part in left or found is None or not weights.numel():
            continue
        if part == "last":  # the first output's offset is the ridge regression's
            weights[1:].copy_(found[1:])
            if weights.ndim > 1:
                weights[0].copy_(found[0])
        else:
            weights.copy_(found)
        carried[part] += weights.numel()
    return dict(carried)


@torch.no_grad()
def mean(network: FusedNetwork, inputs: Inputs, rows: Rows) -> Floats:
    """Predicted means (n) of rows, neither clipped nor calibrated."""
    was_training = network.training
    network.eval()
    device = network.prior.device
    parts = [
        network(tensors(network.config, inputs.take(rows[start : start + _EVALUATED]), device)).mean
        for start in range(0, len(rows), _EVALUATED)
    ]
    network.train(was_training)
    return torch.cat(parts).cpu().numpy().astype(np.float64)


def _copy(network: FusedNetwork) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def _prepared(config: NetworkConfig, inputs: Inputs, rating: Floats, rows: Rows) -> FusedNetwork:
    """A new network that knows the scale of the features and the prior of the stars."""
    network = FusedNetwork(config)
    features = inputs.features[rows].astype(np.float64)  # (n, F)
    known = ~np.isnan(features)
    often = known.mean(0) >= _LEAST_KNOWN
    table = np.where(known | ~often, features, np.nan)
    table[:, ~often] = 0.0
    centre = np.nanmean(table, 0)
    deviation = np.nanstd(table, 0)
    varies = deviation > _LEAST_DEVIATION
    scale = np.where(varies, deviation, 1.0)
    low, high = (np.nanquantile(table, q, axis=0) for q in (_TAIL, 1 - _TAIL))
    used = often & (varies | ~known.all(0))
    for buffer, values in (
        (network.feature_mean, centre),
        (network.feature_scale, scale),
        (network.feature_low, (low - centre) / scale),
        (network.feature_high, (high - centre) / scale),
        (network.feature_used, used),
        (network.prior, np.log(soft_labels(rating[rows]).mean(0) + 1e-3)),
    ):
        buffer.copy_(torch.from_numpy(np.asarray(values, np.float32)))
    return network


def _design(network: FusedNetwork, inputs: Inputs, rows: Rows) -> Floats:
    """Standardised features and missing flags (n, 2 F), as the linear path reads them."""
    with torch.no_grad():
        features = torch.from_numpy(inputs.features[rows])
        return network.standardise(features).numpy().astype(np.float64)


def _residual(network: FusedNetwork, inputs: Inputs, rating: Floats, rows: Rows) -> Floats:
    return rating[rows] - inputs.features[rows, network.config.bias_column]


def _fit_linear(
    network: FusedNetwork, inputs: Inputs, rating: Floats, rows: Rows, penalty: float
) -> float:
    """Set the linear path of every member; returns the intercept, which is the last layer's."""
    design = _design(network, inputs, rows)
    weights, intercept = ridge.solve(design, _residual(network, inputs, rating, rows), penalty)
    with torch.no_grad():
        for member in network.networks:
            member.linear.weight.copy_(torch.from_numpy(weights[None].astype(np.float32)))
            member.last.bias[0] = intercept
    return intercept


def _epochs(
    network: FusedNetwork,
    inputs: Inputs,
    rating: Floats,
    rows: Rows,
    config: FitConfig,
    seed: int,
    device: torch.device,
) -> Iterator[int]:
    """Train the members, all in step; yields the number of epochs done."""
    network.to(device).train()
    generator = np.random.default_rng(seed)
    members = network.networks
    labels = torch.from_numpy(soft_labels(rating[rows])).to(device)
    truth = torch.from_numpy(rating[rows].astype(np.float32)).to(device)
    drawn = (
        generator.poisson(1.0, (len(members), len(rows)))
        if len(members) > 1
        else np.ones((1, len(rows)))
    )
    weights = torch.from_numpy(drawn.astype(np.float32)).to(device)
    for member in members:
        member.linear.requires_grad_(False)
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(rows) // config.batch_rows)
    rates = schedule(optimizer, steps, _WARM_UP, "cosine")
    for epoch in range(1, config.epochs + 1):
        order = torch.from_numpy(generator.permutation(len(rows)))
        for batch in order.split(config.batch_rows):
            chosen = tensors(network.config, inputs.take(rows[batch.numpy()]), device)
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            for number in range(len(members)):
                output = network(chosen, number)
                surprise = -(labels[batch] * tilt(output.logits, output.mean)).sum(1)
                error = (output.mean - truth[batch]).square()
                sizes = _sizes(members[number], chosen)
                cost = surprise + config.squared_error * error + config.identity_decay * sizes
                loss += (weights[number, batch] * cost).mean()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            nn.utils.clip_grad_norm_(learnt, config.clip)
            optimizer.step()  # pyright: ignore[reportUnknownMemberType]
            rates.step()
        yield epoch


def _sizes(member: Member, batch: Tensors) -> Tensor:
    """Squared lengths (n) of the embeddings of each row's ids, summed.

    Paid once an occurrence, as in regularised matrix factorisation (Koren, Bell and Volinsky
    2009): what is seldom seen stays near "unknown". AdamW's decay alone cannot do this, since its
    steps are as large for rare ids as for frequent ones.
    """
    return sum(
        (
            table.table(buckets).square().flatten(1).sum(1)
            for table, buckets in (
                (member.users, batch.user),
                (member.items, batch.item),
                (member.items, batch.recents),
                (member.categories, batch.categories),
                (member.brands, batch.brand),
            )
        ),
        torch.zeros(len(batch.user), device=batch.user.device),
    )


def _believe(correction: Floats, left: Floats) -> float:
    """How much of a correction (n) of what is `left` (n) to believe, from nothing to all."""
    if not correction.any():
        return 0.0
    (share,) = _about((_BELIEF,), correction[None], left)
    return float(np.clip(share, 0, 1))


def _about(prior: Sequence[float], said: Floats, left: Floats) -> Floats:
    """Shares (k) of corrections (k, n) of what is `left` (n): least squares about a prior.

    min Σ (left − shares · said)² + doubt · |shares − prior|², where doubt is the variance of what
    is left over that of the shares: few rows, or small corrections, leave the prior as it is.
    """
    doubt = max(float(left.var()), _LEAST_VARIANCE) / _SHARE_DEVIATION**2
    at = np.array(prior)
    more = np.linalg.solve(said @ said.T + doubt * np.eye(len(said)), said @ (left - at @ said))
    return np.asarray(at + more, np.float64)


@torch.no_grad()
def _keep(network: FusedNetwork, belief: float, intercept: float) -> None:
    """Scale the second stage's correction by `belief`."""
    for member in network.networks:
        member.last.weight[0] *= belief
        member.last.bias[0] = intercept + belief * (member.last.bias[0] - intercept)


def _shared(said: Floats, left: Floats) -> tuple[float, float]:
    """Shares of two corrections (2, n) of what is `left` (n).

    Neither is taken against what it says, and together they are not believed beyond what they say:
    a share is at least zero, and both are at most one.
    """
    ours, theirs = np.maximum(_about(_SHARES, said, left), 0)
    whole = max(ours + theirs, 1.0)
    return float(ours / whole), float(theirs / whole)


@torch.no_grad()
def _plant(network: FusedNetwork, trees: Trees, shares: tuple[float, float]) -> None:
    """Give a network its trees, each side with its share of the correction."""
    ours, theirs = shares
    for member in network.networks:
        member.linear.weight *= ours
        member.last.weight[0] *= ours
        member.last.bias[0] *= ours
    trees.value *= theirs
    network.plant(trees.to(network.prior.device))
