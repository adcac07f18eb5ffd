"""Who may ask for the dashboard; the page itself is driven in `tests/browser`."""

import pytest
from pydantic import ValidationError

from streams.config import WebConfig
from streams.dashboard import OWN_NAMES, allowed_hosts


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_who_listens_to_this_machine_alone_answers_for_its_names_alone(host: str) -> None:
    assert allowed_hosts(WebConfig(host=host)) == [*OWN_NAMES]


def test_others_are_named_and_a_health_check_still_comes_through() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        found = allowed_hosts(WebConfig(host=host, hosts="stars.example,dashboard"))
        assert found == ["stars.example", "dashboard", *OWN_NAMES]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "shop.example"])
def test_who_listens_to_others_answers_by_any_name_unless_told(host: str) -> None:
    assert allowed_hosts(WebConfig(host=host)) == ["*"]


def test_a_pattern_is_no_name() -> None:
    with pytest.raises(ValidationError, match="hosts"):
        WebConfig(hosts="a*.example")
