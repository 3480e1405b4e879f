"""A server on this machine alone is reached by every name that it is called there, and by no other."""

from __future__ import annotations

import pytest

from training_lens.errors import ConfigurationError
from training_lens.web.listener import list_loopback_hosts, listen


def test_the_address_that_it_listens_to_is_one_of_its_names() -> None:
    assert "127.0.0.2:8000" in list_loopback_hosts(8000, "127.0.0.2")
    assert list_loopback_hosts(8000, "::1") == list_loopback_hosts(8000)


def test_only_the_port_of_http_may_be_left_out() -> None:
    assert "localhost" in list_loopback_hosts(80) and "localhost" not in list_loopback_hosts(8000)


def test_an_address_of_another_machine_is_not_a_matter_of_the_port() -> None:
    with pytest.raises(ConfigurationError, match="Give an address of this machine as --host"):
        listen("192.0.2.1", 0, 1)
