"""Which hash tag a partition's keys carry in the store."""

import binascii

SLOTS = 16_384  # of a Redis Cluster


def hash_tags(partitions: int) -> list[bytes]:
    """One hash tag a partition, spread evenly over the slots of a Redis Cluster.

    Partition p's tag hashes into the p-th of `partitions` equal spans of slots, so that a cluster
    of any size gets an even share of the partitions.
    """
    tags: list[bytes] = []
    for partition in range(partitions):
        low = partition * SLOTS // partitions
        high = (partition + 1) * SLOTS // partitions
        attempt = 0
        while not low <= binascii.crc_hqx(b"%d.%d" % (partition, attempt), 0) % SLOTS < high:
            attempt += 1
        tags.append(b"%d.%d" % (partition, attempt))
    return tags
