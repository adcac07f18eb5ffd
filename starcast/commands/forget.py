"""The command that erases users: `forget`."""

from contextlib import closing
from typing import Annotated

import typer

from starcast.commands.context import fail, notes, print_marked, settings_of
from starcast.commands.state import shop_of
from streams.admin import check_topics

WAIT_SECONDS = 60.0  # workers read on within a second, the archiver commits within some

_ITEMS = "item states: sums over all users stay; they tell of nobody"
_MODELS = "models: what they learnt stays until a model is fitted anew"


def forget(
    context: typer.Context,
    users: Annotated[list[str], typer.Argument(metavar="USER", help="Their user_id.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wait: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait for each: catalog, scorer, archiver."),
    ] = WAIT_SECONDS,
) -> None:
    """Erase users from states, attributes and archive, and say until when Kafka keeps the rest.

    Ends with 1 where something could not be erased; run it again then. Who comes back is a new
    user.
    """
    settings = settings_of(context)
    if not yes:
        who = users[0] if len(users) == 1 else f"{len(users)} users"
        typer.confirm(f"Erase {who} for good?", abort=True, err=True)
    check_topics(settings.kafka)  # another count would send null values where the user is not
    from streams.forget import forget as erase
    from streams.forget import kept_by_kafka

    shop = shop_of(settings)
    with closing(shop.store), notes.status("Sending null values") as status:
        places = erase(shop, users, wait, lambda said: status.update(f"Waiting for {said}"))
    for place in places:
        print_marked("fine" if place.erased else "wrong", f"{place.name}: {place.said}")
    for said in (_ITEMS, _MODELS):
        print_marked("note", said)
    for topic, kept in kept_by_kafka(settings.kafka).items():
        print_marked("note", f"Kafka: {topic}: gone {kept}")
    if not all(place.erased for place in places):
        raise fail("Not all is erased yet: run the command again once what it says is done.")
