from __future__ import annotations

from pathlib import Path

import pytest
import temporalio.api.operatorservice.v1 as operator_api
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.client import Client

from crosslogic.clients import temporal
from crosslogic.contracts.names import SEARCH_ATTRIBUTES
from crosslogic.dev.temporal import Temporal
from crosslogic.domain.errors import Rejected, Unavailable
from tests.conftest import make_settings


class TestConnect:
    async def test_says_when_the_server_is_away(self) -> None:
        with pytest.raises(Unavailable, match="CROSSLOGIC_TEMPORAL_ADDRESS"):
            await temporal.connect(make_settings(temporal_address="127.0.0.1:1"))

    async def test_says_when_it_cannot_read_the_certificate(self, tmp_path: Path) -> None:
        with pytest.raises(Rejected, match="Cannot read a TLS file"):
            await temporal.connect(make_settings(temporal_tls_ca=tmp_path / "no.pem"))

    async def test_wants_certificate_and_key_together(self, tmp_path: Path) -> None:
        with pytest.raises(Rejected, match="Set both"):
            await temporal.connect(make_settings(temporal_tls_cert=tmp_path / "cert.pem"))

    async def test_speaks_tls_when_it_is_told_to(self, temporal_server: Temporal) -> None:
        # The server speaks plain text, so a client that really tries TLS cannot connect.
        for tls in ({"temporal_tls": True}, {"temporal_api_key": "a key implies it"}):
            with pytest.raises(Unavailable):
                await temporal.connect(make_settings(temporal_address=temporal_server.address, **tls))


class TestEnsureSearchAttributes:
    async def test_registers_what_is_missing_once(self, temporal_client: Client) -> None:
        await temporal_client.operator_service.remove_search_attributes(
            operator_api.RemoveSearchAttributesRequest(namespace="default", search_attributes=["CrossLogicNode"])
        )
        assert await temporal.ensure_search_attributes(temporal_client, "default") == ["CrossLogicNode"]
        assert await temporal.ensure_search_attributes(temporal_client, "default") == []
        listed = await temporal_client.operator_service.list_search_attributes(
            operator_api.ListSearchAttributesRequest(namespace="default")
        )
        for name in SEARCH_ATTRIBUTES:
            assert listed.custom_attributes[name] == IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
