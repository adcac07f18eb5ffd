"""`explain`: what a rating hangs on.

What it calls imports torch, which takes seconds, so it imports it only when it runs.
"""

import time
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from schemas.exceptions import UnreachableError
from starcast.commands.context import AsJson, output, plain, print_json, settings_of
from starcast.commands.models import chosen_bundle
from starcast.commands.state import store_of
from streams.admin import check_topics


def explain(
    context: typer.Context,
    user: Annotated[str, typer.Option(help="A user_id.")],
    item: Annotated[str, typer.Option(help="An item_id.")],
    model: Annotated[
        str, typer.Option(metavar="VERSION", help="Of a bundle, or `stable`, or `ladder`.")
    ] = "stable",
    top: Annotated[int, typer.Option(min=1, help="So many inputs, the largest first.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Say what a user would give an item, were it asked now, and what each input adds to that.

    Nothing is sent or changed: states, attributes and vectors are read from the store.
    """
    settings = settings_of(context)
    from model import encoder, explain
    from model.features import INDEX
    from model.ids import hash_ids
    from model.ladder import TIERS
    from model.network import gather
    from model.predict import predictor
    from streams.asking import Asking
    from streams.reader import Reader

    bundle = chosen_bundle(settings.models.url, model)
    served = predictor(bundle, "cpu")  # a GPU is for those who serve
    vectors = bundle.encoder_hash if bundle else encoder.setting_hash(settings.models.encoder)
    now = np.array([int(time.time() * 1_000)])
    with suppress(UnreachableError):  # all else is in the store
        check_topics(settings.kafka)  # by another count the user would be looked for elsewhere
    store = store_of(settings)
    asked = Asking(store, Reader(store)).observe(
        vectors or "", hash_ids([user]), hash_ids([item]), now
    )
    store.close()
    events, observation, lookups = asked
    said = served.predict(*asked)
    rating, low, high = (float(each[0]) for each in (said.rating, said.low, said.high))
    parts = [explain.running_bias(float(observation.features[0, INDEX["bias"]]))]
    if served.network is not None:
        inputs = gather(events, observation, lookups, served.vector_width)
        (added,) = explain.explain(served.network, inputs, top)
        parts += [part for part in added if part.stars]
    rest = rating - sum(part.stars for part in parts)
    tier = TIERS[said.tier[0]]
    if as_json:
        document = {"user_id": user, "item_id": item, "rating": rating, "interval": [low, high]}
        document |= {"tier": tier, "model_version": said.version}
        print_json(document | {"inputs": [asdict(part) for part in parts], "rest": rest})
        return
    output.print(
        f"{plain(user)} would give {plain(item)} {rating:.2f} stars, in 8 of 10 cases {low:.1f} to "
        f"{high:.1f}: tier {tier}, by {said.version}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, show_header=False)
    for part in parts:
        table.add_row(f"{part.stars:+.3f}", part.name, Text(part.meaning, style="dim"))
    table.add_row(f"{rest:+.3f}", "all else", Text("other inputs, calibration", style="dim"))
    output.print(table)
