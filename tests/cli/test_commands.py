"""The command line as a program: its words, its output and its exit codes, against the real admin API."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosslogic.domain import ids, keys
from crosslogic.new_ids import new_id
from tests.api.admin.server import TOKEN
from tests.cli.conftest import ROOT, Run
from tests.stripe_double import KEY, Double

Ok = Callable[..., str]
Read = Callable[..., Any]


class TestTenancy:
    def test_from_an_org_to_a_key_and_its_end(self, ok: Ok, read: Read, run: Run) -> None:
        assert read("orgs", "create", "acme", "--region", "in-mumbai", "--region", "us-east-1")[
            "region_preferences"
        ] == [
            "in-mumbai",
            "us-east",
        ]
        ok("orgs", "create", "acme", "--region", "in-mumbai", "--region", "us-east-1")
        environment = read("environments", "create", "--org", "acme", "--env", "prod", "--model", "llama-7b")
        assert environment["allowed_models"] == ["llama-3-8b"]

        printed = ok("keys", "create", "--org", "acme", "--env", "prod", "--name", "laptop")
        key_id = re.search(r"^id +(key_[0-9a-z]{26})$", printed, re.MULTILINE)
        secret = re.search(r"^secret +(sk_prod_\w{32})$", printed, re.MULTILINE)
        assert key_id
        assert secret
        assert keys.is_well_formed(secret[1])
        assert "shown this once" in printed

        listed = ok("keys", "list", "--org", "acme", "--env", "prod")
        assert listed.splitlines()[0].split() == [
            *("id", "org", "environment", "name", "role", "state", "hint", "expires", "at")
        ]
        assert listed.splitlines()[1].split() == [
            *(key_id[1], "acme", "prod", "laptop", "developer", "active", secret[1][-4:], "–")
        ]
        assert secret[1] not in listed

        rotated = read("keys", "rotate", key_id[1], "--overlap-s", "60")
        assert keys.is_well_formed(rotated["new"]["secret"])
        assert rotated["old"]["expires_at"] is not None
        for verb, word in (("suspend", "suspended"), ("resume", "active"), ("revoke", "revoked")):
            assert word in ok("keys", verb, key_id[1])
        refused = run("keys", "resume", key_id[1])
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == f"Error: Key {key_id[1]} is revoked, which is for ever. Create a new key.\n"

        assert "suspended" in ok("orgs", "suspend", "acme")
        assert read("orgs", "list")[0]["state"] == "suspended"
        assert "active" in ok("orgs", "resume", "acme")
        assert read("orgs", "set", "acme", "--operator")["is_operator"] is True
        assert read("orgs", "set", "acme", "--no-operator")["is_operator"] is False
        assert "intact" in ok("audit", "verify")
        assert [row["action"] for row in read("audit", "list", "--limit", "2")] == ["org.update", "org.update"]

    def test_limits_of_every_layer(self, ok: Ok, read: Read) -> None:
        ok("orgs", "create", "acme")
        environment = read("environments", "create", "--org", "acme", "--env", "dev")
        key = read("keys", "create", "--org", "acme", "--env", "dev")
        ok("limits", "set", "--key", key["id"], "--requests-per-min", "2", "--concurrency", "none")
        row = read("limits", "set", "--key", key["id"], "--concurrency", "default", "--tokens-per-day", "1_000_000")
        assert (row["requests_per_min"], row["concurrency"], row["tokens_per_day"]) == (2, None, 1_000_000)
        shown = dict(re.split(r"  +", line) for line in ok("limits", "show", "--key", key["id"]).splitlines())
        assert shown["requests per min"] == "2"
        assert shown["concurrency"] == "default"
        assert "monthly spend microdollars" not in shown
        for whose in (
            ("--global",),
            ("--org", "acme"),
            ("--environment", environment["id"]),
            ("--org", "acme", "--env", "dev"),
        ):
            assert read("limits", "set", *whose, "--tokens-per-min", "5")["tokens_per_min"] == 5
        assert read("limits", "set", "--global", "--dry-run", "tokens-per-min,concurrency")["dry_run"] == [
            "tokens_per_min",
            "concurrency",
        ]
        assert "tokens_per_min, concurrency" in ok("limits", "show", "--global")
        assert read("limits", "set", "--global", "--dry-run", "none")["dry_run"] == []
        spend = read("limits", "set", "--org", "acme", "--monthly-spend-microdollars", "none")
        assert (spend["monthly_spend_microdollars"], spend["tokens_per_min"]) == (-1, 5)


class TestFleet:
    def test_setup_sows_the_demo_and_may_be_repeated(self, run: Run, stack: str, read: Read) -> None:
        first = run("setup")
        assert first.returncode == 0, first.stderr
        assert "schema: up to date" in first.stdout
        assert "search attributes: " in first.stdout
        assert "key sk_dev_demo" in first.stdout
        again = run("setup")
        assert (again.returncode, again.stderr) == (0, "")
        assert "demo: all there" in again.stdout

        assert [(row["org"], row["name"]) for row in read("environments", "list")] == [
            ("demo", "dev"),
            ("demo", "staging"),
            ("demo", "prod"),
        ]
        assert [row["hint"] for row in read("keys", "list")] == ["demo"]
        deployments = {row["name"]: row for row in read("deployments", "list")}
        assert deployments["llama-7b"]["regions"] == [
            {"region": "in-mumbai", "replicas_min": 2, "replicas_max": 2},
            {"region": "us-east", "replicas_min": 1, "replicas_max": 1},
        ]
        assert deployments["bge-base-en"]["model"] == "bge-base-en"
        models = {row["name"]: row for row in read("models")}
        for name in ("llama-3-8b", "bge-base-en"):
            assert "SmolLM2" in models[name]["metadata"]["served_by"]
        assert models["mistral-7b"]["metadata"] == {}

    def test_what_an_operator_has_changed_survives_setup(self, run: Run, ok: Ok, read: Read) -> None:
        run("setup")
        demo_key = read("keys", "list")[0]["id"]
        ok("keys", "revoke", demo_key)
        ok("orgs", "suspend", "demo")
        changed = read("deployments", "set", "llama-7b", "--region", "ap-south-1=1..3", "--strategy", "round-robin")
        assert changed["is_workflow_told"]
        assert run("setup").returncode == 0
        assert read("keys", "list")[0]["state"] == "revoked"
        assert read("orgs", "list")[0]["state"] == "suspended"
        kept = next(row for row in read("deployments", "list") if row["name"] == "llama-7b")
        assert kept["strategy"] == "round-robin"
        assert kept["regions"] == [
            {"region": "in-mumbai", "replicas_min": 1, "replicas_max": 3},
            {"region": "us-east", "replicas_min": 1, "replicas_max": 1},
        ]
        assert "in-mumbai=1..3, us-east=1" in ok("deployments", "list")

    def test_how_a_deployment_grows_is_set_and_kept(self, run: Run, read: Read) -> None:
        run("setup")
        options = ("--ttft-target-ms", "2000", "--spend-cap-usd-per-h", "4.50", "--gpu", "L4", "--gpu", "A100")
        made = read("deployments", "set", "llama-7b", *options)["scaling"]
        assert (made["ttft_target_ms"], made["spend_cap_microdollars_per_h"]) == (2000, 4_500_000)
        again = read("deployments", "set", "llama-7b", "--ttft-target-ms", "none", "--idle-s", "120")["scaling"]
        assert again == {**made, "ttft_target_ms": None, "idle_s": 120}
        assert read("deployments", "decisions", "llama-7b") == []
        assert "write US dollars" in run("deployments", "set", "llama-7b", "--spend-cap-usd-per-h", "-1e99").stderr

    def test_nodes_start_and_join_through_workflows(self, ok: Ok, read: Read, run: Run) -> None:
        node_id = ids.NODE.show(new_id())
        started = read("nodes", "start", "--model", "llama-7b", "--region", "us-east", "--node-id", node_id)
        assert started == {"node_id": node_id, "workflow_id": f"provision/{node_id}"}
        joined = ok("nodes", "join", "--model", "llama-7b", "--region", "us-east", "--endpoint", "http://127.0.0.1:1")
        assert re.search(r"^node id +node_[0-9a-z]{26}$", joined, re.MULTILINE)
        assert re.search(r"^credential +nc_[\w-]{43}$", joined, re.MULTILINE)
        assert ok("nodes", "list", "--in-state", "ready") == "There are no such nodes.\n"
        assert ok("nodes", "hazards", "--days", "7") == "No spot machine has served yet.\n"
        assert run("nodes", "show", node_id).returncode == 1
        refused = run("nodes", "join", "--model", "x", "--region", "us-east", "--endpoint", "https://169.254.169.254")
        assert refused.returncode == 1
        assert "endpoint" in refused.stderr

    def test_deadlines_of_a_model(self, ok: Ok, read: Read) -> None:
        ok("deadlines", "set", "llama-7b", "--first-token-timeout-ms", "5000", "--idle-timeout-ms", "900")
        made = read("deadlines", "set", "llama-7b", "--idle-timeout-ms", "default")
        assert made["deadlines"]["first_token_timeout_ms"] == 5000
        assert made["deadlines"]["idle_timeout_ms"] is None
        lines = {line.split()[0]: line.split()[1:] for line in ok("deadlines", "list").splitlines()}
        assert lines["llama-3-8b"] == ["–", "5000", "–", "–"]

    def test_prices_and_usage_for_people(self, ok: Ok) -> None:
        lines = {line.split()[0]: line for line in ok("models").splitlines()}
        assert re.search(r"llama-7b +chat +8192 +0\.0500 +0\.0500$", lines["llama-3-8b"])
        assert lines["bge-base-en"].endswith("0.0100  –")
        assert "0.7×" in ok("regions")
        assert "Nothing was used" in ok("usage", "--by", "day")


class TestSweeps:
    def test_are_started_and_listed(self, ok: Ok, read: Read) -> None:
        assert "There was no sweep yet." in ok("sweeps", "list")
        assert "No sweep has found anything." in ok("sweeps", "list", "--findings")
        assert read("sweeps", "run", "--dry-run")["workflow_id"].startswith("sweep/")


class TestConnection:
    def test_finds_its_api_in_every_documented_way(self, run: Run, stack: str, tmp_path: Path) -> None:
        bare = {"CROSSLOGIC_STATE_DIR": str(tmp_path / "nothing"), "CROSSLOGIC_ADMIN_TOKEN": ""}
        ways: list[tuple[tuple[str, ...], dict[str, str]]] = [
            (("regions", "--api", stack, "--token", TOKEN), bare),
            (("--api", f"{stack}/", "--token", TOKEN, "regions"), bare),
            (("regions",), bare | {"CROSSLOGIC_API_URL": stack, "CROSSLOGIC_ADMIN_TOKEN": TOKEN}),
            (("--state", str(tmp_path / "state"), "regions", "--token", TOKEN), bare),
            (("regions", "--state", str(tmp_path / "state"), "--token", TOKEN), bare),
        ]
        for words, environment in ways:
            done = run(*words, **environment)
            assert done.returncode == 0, (words, done.stderr)
            assert "in-mumbai" in done.stdout

    @pytest.mark.parametrize(
        ("words", "hint"),
        [
            (("--state", "/nonexistent"), "Start one with ./run"),
            (("--api", "http://127.0.0.1:1"), "Start it with ./run"),
            (("--api", "gopher"), "Write http://"),
        ],
    )
    def test_without_an_api_one_line_says_what_to_do(self, words: tuple[str, str], hint: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "crosslogic.cli", "keys", "list", *words],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("Error: ")
        assert hint in done.stderr

    def test_a_wrong_token_or_another_server_is_named(self, run: Run, stack: str) -> None:
        wrong = run("keys", "list", "--token", "adm_wrong")
        assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
        assert "--token" in wrong.stderr
        other = run("keys", "list", "--api", f"{stack}/elsewhere")
        assert other.returncode == 1

    def test_setup_checks_the_stripe_key_and_in_dev_mode_sets_billing_up(self, run: Run, double: Double) -> None:
        done = run("setup", CROSSLOGIC_STRIPE_API_KEY=KEY, CROSSLOGIC_STRIPE_URL=double.url)
        assert done.returncode == 0, done.stderr
        assert "billing: Stripe account in test mode" in done.stdout
        assert "things at Stripe" in done.stdout
        done = run("setup", CROSSLOGIC_STRIPE_API_KEY="sk_test_wrong", CROSSLOGIC_STRIPE_URL=double.url)
        assert done.returncode == 1
        assert "CROSSLOGIC_STRIPE_API_KEY" in done.stderr
        assert "sk_test_wrong" not in done.stderr + done.stdout

    def test_setup_says_which_setting_is_wrong(self, run: Run) -> None:
        done = run("setup", "--wait-s", "0", CROSSLOGIC_MODE="production", CROSSLOGIC_ADMIN_TOKEN="too-short")
        assert done.returncode == 1
        assert "CROSSLOGIC_ADMIN_TOKEN" in done.stderr
        assert "too-short" not in done.stderr
        done = run("setup", "--wait-s", "0", CROSSLOGIC_DATABASE_URL="postgresql://127.0.0.1:1/none")
        assert done.returncode == 1
        assert done.stderr.startswith("Error: Postgres cannot be reached")
        done = run("setup", "--wait-s", "0", CROSSLOGIC_TEMPORAL_ADDRESS="127.0.0.1:1")
        assert done.returncode == 1
        assert "Temporal cannot be reached" in done.stderr


class TestUsage:
    @pytest.mark.parametrize(
        "words",
        [
            ("keys", "create", "--org", "demo"),
            ("keys", "fly"),
            ("limits", "set", "--key", "key_1"),
            ("limits", "set", "--requests-per-min", "1"),
            ("limits", "set", "--global", "--org", "demo", "--requests-per-min", "1"),
            ("limits", "set", "--global", "--requests-per-min", "many"),
            ("limits", "set", "--global", "--requests-per-min", "-5"),
            ("limits", "set", "--global", "--dry-run", "everything"),
            ("keys", "list", "--env", "dev"),
            ("orgs", "set", "demo"),
            ("deadlines", "set", "llama-7b"),
            ("deadlines", "set", "llama-7b", "--idle-timeout-ms", "0"),
            ("nodes", "price", "node_1", "-5"),
            ("requests", "show"),
        ],
    )
    def test_wrong_words_exit_with_2_and_ask_nobody(self, words: tuple[str, ...]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "crosslogic.cli", "--api", "http://127.0.0.1:1", *words],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr

    def test_a_command_loads_nothing_heavy(self) -> None:
        """Start-up time: what a command does not need is not imported."""
        program = (
            "import sys\n"
            "sys.argv = ['run', 'keys', 'list', '--api', 'http://127.0.0.1:1']\n"
            "from crosslogic.cli.commands import main\n"
            "try:\n    main()\n"
            "except SystemExit:\n    print(' '.join(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        loaded = set(done.stdout.split())
        assert "httpx" in loaded
        assert not loaded & {"temporalio", "asyncpg", "fastapi", "rich.console", "pygments", "crosslogic.settings"}
