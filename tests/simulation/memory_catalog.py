"""The catalog in memory: two regions, two models, and whatever deployments a scenario makes."""

from __future__ import annotations

from crosslogic.domain.catalog import Catalog, Deployment, Model
from crosslogic.domain.deployment import RegionTarget
from crosslogic.domain.regions import Region, RegionMap

REGIONS = (
    Region("in-mumbai", "Mumbai, India", 7000, ("ap-south-1",), ("us-east",)),
    Region("us-east", "Virginia, USA", 10000, ("us-east-1",), ()),
)
MODELS = (
    Model("llama-3-8b", "Llama", "chat", 8192, 500, 500, ("llama-7b",), vram_gb=16),
    Model("bge-base-en", "BGE", "embedding", 512, 100, None, vram_gb=2),
)


class MemoryCatalog:
    """What `crosslogic.store.catalog.CatalogStore` reads. It has no clock: nobody books reservations here."""

    def __init__(self) -> None:
        self.deployments: dict[str, Deployment] = {}

    def put(self, name: str, model: str, *targets: RegionTarget) -> None:
        """Promise so many replicas."""
        self.deployments[name] = Deployment(name, model, "least-load", targets)

    def load(self) -> Catalog:
        return Catalog.of(MODELS, RegionMap.of(REGIONS), self.deployments.values())
