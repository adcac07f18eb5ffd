"""Users who are forgotten while their events go on."""

from random import Random

from tests.faults.forgetting import forget_until_erased
from tests.faults.kinds.kind import Kind
from tests.faults.numbered import HOT
from tests.faults.world import FaultyShop, World

USERS = 4  # forgotten together with one of those that are hot
ERASED_SECONDS = 90.0  # what is not erased by then is asked for again at the end


def _forgotten(world: World, shop: FaultyShop, random: Random) -> str:
    count = shop.events.users
    chosen = [count + random.randrange(HOT), *random.sample(range(count), USERS)]
    users = [f"u{user}" for user in chosen]
    shop.describe_users(users)
    left = forget_until_erased(shop, users, ERASED_SECONDS)
    return f"{', '.join(users)}{'; not yet: ' if left else ''}{left}"


KINDS: tuple[Kind, ...] = (
    Kind(
        "users forgotten",
        "users",
        _forgotten,
        "null values, then an archive without what came before, as `starcast forget` does it",
    ),
)
