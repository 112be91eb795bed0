"""Usage and billing from the command line: files out and in, and months in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosslogic.domain import ids
from crosslogic.new_ids import new_id

Ok = Callable[..., str]
SPAN = ("--start", "2026-03-01T00:00:00Z", "--end", "2026-04-01T00:00:00Z")


@pytest.fixture
def lines(ok: Ok, tmp_path: Path) -> Path:
    """Three records of an org `acme` as CSV."""
    org = json.loads(ok("orgs", "create", "acme", "--json"))["id"]
    fixed = f"{org},{ids.ENVIRONMENT.show(new_id())},{ids.KEY.show(new_id())},us-east,llama-3-70b"
    rows = [f"old-{day},2026-03-0{day}T10:00:00Z,{fixed},20000" for day in (1, 2, 3)]
    file = tmp_path / "old.csv"
    file.write_text(
        "\n".join(["request_id,admitted_at,org_id,environment_id,key_id,home_region,model,prompt_tokens", *rows])
    )
    return file


class TestUsage:
    def test_goes_out_and_in_again_without_counting_twice(self, ok: Ok, lines: Path, tmp_path: Path) -> None:
        assert "3 records are new, 0 were" in ok("usage", "import", str(lines))
        out = tmp_path / "march.jsonl"
        assert "3 records are in" in ok("usage", "export", *SPAN, "--out", str(out))
        first = out.read_bytes()
        manifest: dict[str, Any] = json.loads((tmp_path / "march.jsonl.manifest.json").read_text())
        assert (manifest["records"], manifest["prompt_tokens"]) == (3, 60_000)
        assert "0 records are new, 3 were" in ok("usage", "import", str(out))
        ok("usage", "export", *SPAN, "--out", str(out))
        assert out.read_bytes() == first

    def test_a_file_that_is_not_what_its_manifest_says_is_not_taken(
        self, ok: Ok, run: Callable[..., Any], stack: str, lines: Path, tmp_path: Path
    ) -> None:
        ok("usage", "import", str(lines))
        out = tmp_path / "march.jsonl"
        ok("usage", "export", *SPAN, "--out", str(out))
        out.write_text(out.read_text().replace("20000", "20001", 1))
        done = run("usage", "import", str(out))
        assert done.returncode == 1
        assert "is not the file" in done.stderr


class TestBilling:
    def test_shows_a_month_to_people_and_programs(self, ok: Ok, lines: Path) -> None:
        ok("usage", "import", str(lines))
        shown = json.loads(ok("billing", "preview", "acme", "2026-03", "--json"))
        assert (shown["tokens"], shown["exact_e10"], shown["usage_microdollars"]) == (60_000, 210_000_000, 21_000)
        assert "$0.021000" in ok("billing", "preview", "acme", "2026-03")
        assert "$0.021000" in ok("billing", "what-if", "acme", "2026-03", "--price-book", "v1")
