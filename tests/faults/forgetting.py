"""Forgetting users again and again until all is erased, as one does whose command says what is not.

The code of `starcast forget` runs unchanged.
"""

import time
from contextlib import closing

from confluent_kafka import KafkaException

from schemas.exceptions import StarcastError
from streams.exceptions import BrokerError
from streams.forget import forget
from streams.rebuild import Shop
from streams.tail import bounds
from tests.faults.world import PARTITIONS, FaultyShop, NotReached, Span

MARKED = ("score-requests", "predicted-ratings")  # erased as far as they went when it was done
WAIT_SECONDS = 20.0  # for each of those that read the null values
PAUSE_SECONDS = 1.0


def forget_until_erased(shop: FaultyShop, users: list[str], seconds: float) -> str:
    """Forget users until all is erased, but no longer than this; what is not erased yet.

    Raises NotReached when no attempt came to its end.
    """
    shop.forgotten |= dict.fromkeys(users)
    until, sent = time.monotonic() + seconds, False
    while True:
        try:
            before = _ends(shop)
            with closing(shop.store) as store:
                settings = shop.settings
                place = Shop(store, shop.kafka, settings.archive, settings.states)
                found = forget(place, users, WAIT_SECONDS)
            left = "; ".join(f"{each.name} {each.said}" for each in found if not each.erased)
            sent = True
            if not left:
                shop.forgotten |= dict.fromkeys(users, Span(before, _ends(shop)))
                return ""
        except StarcastError as error:  # a server that is not back yet
            left = f"{type(error).__name__}: {error}"
        shop.played["forgotten again"] += 1
        if time.monotonic() > until:
            if not sent:
                raise NotReached(left)
            return left
        time.sleep(PAUSE_SECONDS)


def _ends(shop: FaultyShop) -> dict[tuple[str, int], int]:
    try:
        return {
            (topic, partition): end
            for topic in MARKED
            for partition, (_, end) in bounds(shop.kafka, topic, range(PARTITIONS)).items()
        }
    except KafkaException as error:
        raise BrokerError(str(error)) from error
