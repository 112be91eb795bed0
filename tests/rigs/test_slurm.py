"""Unmodified SkyPilot on a Slurm cluster of this computer: machines of one's own, without addresses or prices."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.clients.cloud_contract import CloudContract
from tests.rigs.control_plane import ControlPlane
from tests.rigs.landlords import SlurmLandlord
from tests.rigs.slurm import SlurmRig

pytestmark = [pytest.mark.rigs, pytest.mark.timeout(900)]


@pytest.fixture
async def landlord(slurm_rig: SlurmRig, control_plane: ControlPlane) -> AsyncIterator[SlurmLandlord]:
    made = SlurmLandlord(slurm_rig, control_plane)
    yield made
    await made.cloud.close()


class TestContract(CloudContract):
    pass
