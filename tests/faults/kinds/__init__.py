"""The kinds of faults: each a function that does the harm, waits, and ends it.

A fault returns when its cause is gone; that all goes on is for the checks at the end to say. It
raises NotReached when it could not be done (a worker that was down); it is then tried again.
"""

from tests.faults.kinds import archiver, brokers, models, network, stores, users, workers

KINDS = (
    *workers.KINDS,
    *stores.KINDS,
    *network.KINDS,
    *brokers.KINDS,
    *archiver.KINDS,
    *models.KINDS,
    *users.KINDS,
)
BY_KIND = {kind.name: kind for kind in KINDS}
EVERYWHERE = ("brokers", "models")  # lanes that all shops share
