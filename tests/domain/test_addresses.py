from __future__ import annotations

import pytest

from crosslogic.domain.addresses import read_networks, refusal
from crosslogic.domain.errors import Rejected

NEVER = (
    *("169.254.169.254", "fe80::1%eth0", "fd00:ec2::254", "100.100.100.200", "224.0.0.1", "0.0.0.0", "::"),
    *("::ffff:169.254.169.254", "not an address"),
)


class TestRefusal:
    """H7."""

    @pytest.mark.parametrize("address", NEVER)
    def test_some_addresses_are_nobodys(self, address: str) -> None:
        assert refusal(address, read_networks("0.0.0.0/0,::/0"), is_loopback_allowed=True) is not None

    @pytest.mark.parametrize("address", ["10.1.2.3", "192.168.0.9", "fd12::1", "::ffff:10.1.2.3", "100.64.0.1"])
    def test_private_ones_must_be_listed(self, address: str) -> None:
        assert refusal(address, (), is_loopback_allowed=True) is not None
        listed = read_networks("10.0.0.0/8, 192.168.0.0/16,fd12::/16,100.64.0.0/10")
        assert refusal(address, listed, is_loopback_allowed=False) is None

    def test_loopback_is_for_dev_mode(self) -> None:
        assert refusal("127.0.0.1", (), is_loopback_allowed=True) is None
        assert refusal("::1", read_networks("::/0"), is_loopback_allowed=False) is not None

    def test_public_ones_are_fine(self) -> None:
        assert refusal("8.8.8.8", (), is_loopback_allowed=False) is None

    def test_networks_that_cannot_be_read_are_refused(self) -> None:
        with pytest.raises(Rejected, match="CROSSLOGIC_NODE_NETWORKS"):
            read_networks("10.0.0.0/33")
