"""Configurations of networks for tests; those of shops have the sizes of `trainer.config`."""

from typing import Any

from model.network import NetworkConfig, network_config

SIZES = {
    "vector": 64,
    "width": 96,
    "token": 32,
    "heads": 2,
    "identity": 8,
    "factors": 0,
    "dropout": 0.1,
    "unknown": 0.2,
    "members": 1,
}


def default_config(**changes: Any) -> NetworkConfig:
    """That of a network without a taste, unless told."""
    return network_config(**{**SIZES, **changes})
