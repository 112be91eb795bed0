"""Regions: ours by name, the clouds' by alias; which ones may answer a request, and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from crosslogic.domain.errors import Rejected


@dataclass(frozen=True, slots=True)
class Region:
    """A place where we serve. `multiplier_bp` scales list prices in basis points (10 000 = 1.0×)."""

    name: str
    title: str
    multiplier_bp: int
    aliases: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RegionWish:
    """What a request asked for: `IN-MUMBAI` or, never to leave it, `in-mumbai;strict`."""

    region: str
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """Where a request belongs (`home`, which prices it) and where it may be served, best first."""

    home: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RegionMap:
    """All regions by every name they go by."""

    regions: Mapping[str, Region]
    by_alias: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, regions: Iterable[Region]) -> RegionMap:
        """Build the map; region names win over other regions' aliases."""
        known = {region.name: region for region in regions}
        aliases = {alias: region.name for region in known.values() for alias in region.aliases}
        return cls(known, aliases | {name: name for name in known})

    def resolve(self, name: str) -> str:
        """Our name for a region's name or cloud alias. Raises Rejected for an unknown one."""
        found = self.by_alias.get(name.strip().lower())
        if found is None:
            raise Rejected(
                f"Unknown region {name[:64]!r}. Use one of: {', '.join(sorted(self.regions))}.",
                code="unknown_region",
                param="region",
            )
        return found

    def wish(self, expression: str) -> RegionWish:
        """Read `REGION` or `REGION;strict`. Raises Rejected for any other form."""
        name, _, flag = expression.partition(";")
        if flag.strip().lower() not in ("", "strict"):
            raise Rejected(
                f"Cannot read region {expression[:64]!r}: write REGION or REGION;strict.",
                code="unknown_region",
                param="region",
            )
        return RegionWish(self.resolve(name), bool(flag.strip()))

    def plan(self, wish: RegionWish | None, preferences: Sequence[str]) -> RegionPlan:
        """Home is what was asked for, else the first preference (the environment's, then the org's).

        A strict wish has no other candidate; otherwise the home's fallback order follows.
        """
        if wish is not None:
            home, is_strict = wish.region, wish.is_strict
        else:
            home, is_strict = (
                next((name for name in preferences if name in self.regions), next(iter(self.regions))),
                False,
            )
        if is_strict:
            return RegionPlan(home, (home,))
        return RegionPlan(home, (home, *(name for name in self.regions[home].fallback if name in self.regions)))
