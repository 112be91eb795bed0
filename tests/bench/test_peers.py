"""The peers' locks: exact, with hashes, and without a host."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import peers
from crosslogic import bootstrap
from crosslogic.bootstrap import ROOT


class TestLocks:
    @pytest.mark.parametrize("name", peers.REQUIREMENTS)
    def test_every_package_is_pinned_with_hashes(self, name: str) -> None:
        text = (ROOT / "requirements" / f"bench-{name}.lock").read_text()
        assert "://" not in text
        assert not re.search(r"^\s*(--(extra-)?index-url|--find-links|-i|-f)\b", text, re.MULTILINE)
        packages = re.split(r"\n(?=\S)", text.strip())
        assert len(packages) > 10
        assert all(re.match(r"[a-z0-9._-]+==\S+", package) and "--hash=sha256:" in package for package in packages)

    @pytest.mark.parametrize("name", peers.REQUIREMENTS)
    def test_each_has_an_environment_of_its_own(self, name: str) -> None:
        assert bootstrap.environment_of(Path(f"requirements/bench-{name}.lock")).name == f".venv-bench-{name}"

    def test_portkey_s_packages_have_hashes_and_no_address(self) -> None:
        text = (peers.PORTKEY / "package-lock.json").read_text()
        assert "://" not in text
        packages = {name: package for name, package in json.loads(text)["packages"].items() if name}
        assert len(packages) > 10
        assert all(package["integrity"].startswith("sha512-") for package in packages.values())

    @pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
    def test_the_version_under_test_is_known(self, peer: peers.Peer) -> None:
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", peers.version(peer.name))
