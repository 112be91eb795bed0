"""Both rigs, each up for the tests of one module: two at once would be too much for two processors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rigs.aws import AwsRig
from tests.rigs.control_plane import ControlPlane
from tests.rigs.rig import install_packages, require_root_and_debian
from tests.rigs.slurm import SlurmRig


@pytest.fixture(scope="session", autouse=True)
def prepared() -> None:
    """Root, and the packages."""
    require_root_and_debian()
    install_packages()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    plane = ControlPlane()
    yield plane
    plane.stop()


@pytest.fixture(scope="module")
def aws_rig(prepared: None) -> Iterator[AwsRig]:
    with tempfile.TemporaryDirectory(prefix="crosslogic-aws-", ignore_cleanup_errors=True) as folder:
        rig = AwsRig(Path(folder))
        try:
            rig.start()
            yield rig
        finally:
            rig.stop()


@pytest.fixture(scope="module")
def slurm_rig(prepared: None) -> Iterator[SlurmRig]:
    # Jobs run as a user of their own, who cannot enter pytest's folders.
    with tempfile.TemporaryDirectory(prefix="crosslogic-slurm-", ignore_cleanup_errors=True) as folder:
        rig = SlurmRig(Path(folder))
        try:
            rig.start()
            yield rig
        finally:
            rig.stop()
