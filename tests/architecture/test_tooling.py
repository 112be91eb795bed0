"""The tools keep their word: `./test`, its suites, the locks and the rule about skips."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from crosslogic.dev import locks, tasks

ROOT = Path(__file__).resolve().parents[2]


class TestSelect:
    def test_the_default_leaves_out_every_long_suite(self) -> None:
        selection = tasks.select([])
        assert selection is not None
        for suite in tasks.SUITES:
            assert (f"not {suite.name}" in selection[-1]) == suite.is_long

    def test_further_arguments_go_to_pytest(self) -> None:
        assert tasks.select(["fast", "-k", "regions"]) == [*(tasks.select(["fast"]) or []), "-k", "regions"]

    def test_a_path_runs_alone(self) -> None:
        assert tasks.select(["tests/architecture/test_tooling.py::TestSelect"]) == [
            "tests/architecture/test_tooling.py::TestSelect"
        ]

    def test_every_long_suite_is_a_registered_mark(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        marks = {line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
        assert marks == {suite.name for suite in tasks.SUITES if suite.is_long}


class TestCommand:
    def test_an_unknown_name_is_answered_with_the_list(self) -> None:
        done = subprocess.run([sys.executable, "test", "fsat"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "no suite or check named 'fsat'" in done.stderr
        for row in (*tasks.SUITES, *tasks.CHECKS):
            assert f"./test {row.name}" in done.stderr

    def test_ci_runs_every_check_and_the_long_suites(self) -> None:
        script = (ROOT / ".ci" / "run").read_text()
        names = [check.name for check in tasks.CHECKS if check.name not in ("reference", "bench")]
        names += [suite.name for suite in tasks.SUITES if suite.is_long and suite.in_ci]
        for name in names:
            assert f'"./test {name}"' in script


class TestSkipLaw:
    @pytest.mark.parametrize(
        ("body", "ci", "code"),
        [
            ("import pytest\ndef test_a(): pytest.skip('not today')", "true", 1),
            ("import pytest\n@pytest.mark.skip\ndef test_a(): pass\ndef test_b(): pass", "true", 1),
            ("import pytest\npytest.skip('whole file', allow_module_level=True)", "true", 1),
            ("import pytest\n@pytest.mark.xfail\ndef test_a(): assert 0", "true", 1),
            ("import pytest\ndef test_a(): pytest.skip('not today')", "", 0),
            ("def test_a(): pass", "true", 0),
        ],
    )
    def test_ci_fails_on_a_skip_that_nobody_accepted(self, tmp_path: Path, body: str, ci: str, code: int) -> None:
        (tmp_path / "test_it.py").write_text(body)
        (tmp_path / "test_other.py").write_text("def test_always(): pass")
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        options = ["-p", "tests.plugin", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini")]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", str(tmp_path)],
            cwd=ROOT,
            env={"CI": ci, "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert ("skipped without an accepted reason" in done.stdout) == bool(code)


class TestLocks:
    def test_are_what_pyproject_asks_for(self) -> None:
        assert locks.problems(ROOT) == []

    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        return tmp_path

    def test_a_changed_dependency_is_noticed(self, copy: Path) -> None:
        project = copy / "pyproject.toml"
        project.write_text(project.read_text().replace('"httpx>=', '"httpx>=0.'))
        assert any("run ./test lock" in problem for problem in locks.problems(copy))

    def test_a_host_is_noticed(self, copy: Path) -> None:
        lock = copy / "requirements" / "run.lock"
        lock.write_text("--index-url https://example.test/simple\n" + lock.read_text())
        assert any("names a host" in problem for problem in locks.problems(copy))

    def test_a_missing_hash_is_noticed(self, copy: Path) -> None:
        lock = copy / "requirements" / "uv.lock"
        lock.write_text("uv==0.13.8\n")
        assert locks.problems(copy) == ["requirements/uv.lock: uv has no hash"]

    def test_locks_that_disagree_are_noticed(self, copy: Path) -> None:
        lock = copy / "requirements" / "server.lock"
        lock.write_text(lock.read_text().replace("httpx==", "httpx==9."))
        assert any("httpx 9." in problem for problem in locks.problems(copy))
