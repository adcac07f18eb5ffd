"""Settings of training beside what is made of them."""

import pytest
from pydantic import ValidationError

from model.network import NetworkConfig, network_config
from trainer.config import SizesConfig, TrainerConfig


@pytest.mark.parametrize("name", SizesConfig.model_fields)
def test_a_size_has_its_default_in_the_settings_alone(name: str) -> None:
    size = NetworkConfig.model_fields[name]
    assert size.is_required()
    assert size.metadata == SizesConfig.model_fields[name].metadata  # its bounds


def test_a_network_has_the_sizes_of_the_settings() -> None:
    sizes = SizesConfig().model_dump()
    made = network_config(vector=0, **sizes).model_dump()
    assert sizes.items() <= made.items()


@pytest.mark.parametrize("seed", [-1, 2**31, 10**20])
def test_a_seed_that_libraries_do_not_take_is_refused(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        TrainerConfig(seed=seed)
