"""The bootstrap in a checkout of its own, with a `uv` that only notes that it was called: no index is asked here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosslogic.bootstrap import ROOT
from crosslogic.settings import child_environment

UV = """\
#!/bin/sh
echo "$@" >> "{calls}"
[ -e "{slow}" ] && sleep 60
[ -e "{broken}" ] && echo "no such index" && exit 2
exit 0
"""


class Checkout:
    """The bootstrap module and empty locks, somewhere else."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls, self.slow, self.broken = (root / name for name in ("calls", "slow", "broken"))
        (root / "crosslogic").mkdir()
        shutil.copy(ROOT / "crosslogic" / "bootstrap.py", root / "crosslogic")
        (root / "requirements").mkdir()
        for name in ("run", "dev", "uv"):
            (root / "requirements" / f"{name}.lock").write_text(f"# {name}\n")
        programs = root / "bin"
        programs.mkdir()
        (programs / "uv").write_text(UV.format(calls=self.calls, slow=self.slow, broken=self.broken))
        (programs / "uv").chmod(0o755)
        self._environment = child_environment()
        self._environment["PATH"] = os.pathsep.join([str(programs), self._environment["PATH"]])

    def start(self, lock: str = "run") -> subprocess.Popen[str]:
        path = f"requirements/{lock}.lock"
        code = f"from crosslogic.bootstrap import Path, ensure; print(ensure(Path({path!r})))"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ensure(self, lock: str = "run") -> tuple[Path, str]:
        """The Python that it names, and what it said on the way."""
        process = self.start(lock)
        shown, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        return Path(shown.strip()), said

    def installs(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


class TestEnsure:
    def test_installs_once_and_says_so_once(self, checkout: Checkout) -> None:
        python, said = checkout.ensure()
        assert python == checkout.root / ".venv" / "bin" / "python"
        assert subprocess.run([python, "-c", "pass"]).returncode == 0
        assert "Preparing .venv" in said
        assert checkout.ensure() == (python, "")
        assert checkout.installs() == 1
        call = checkout.calls.read_text()
        assert "--require-hashes" in call
        assert "--no-deps" in call
        assert "index" not in call, "where packages come from is the user's own configuration"

    def test_a_changed_lock_is_installed_again(self, checkout: Checkout) -> None:
        checkout.ensure()
        (checkout.root / "requirements" / "run.lock").write_text("# other\n")
        checkout.ensure()
        assert checkout.installs() == 2

    def test_the_wider_lock_satisfies_the_narrower_one(self, checkout: Checkout) -> None:
        checkout.ensure("dev")
        checkout.ensure("run")
        assert checkout.installs() == 1

    def test_the_narrower_lock_does_not_satisfy_the_wider_one(self, checkout: Checkout) -> None:
        checkout.ensure("run")
        checkout.ensure("dev")
        assert checkout.installs() == 2

    def test_two_at_once_install_once(self, checkout: Checkout) -> None:
        both = [checkout.start(), checkout.start()]
        assert [process.wait(60) for process in both] == [0, 0]
        assert checkout.installs() == 1

    def test_an_interrupted_installation_is_made_anew(self, checkout: Checkout) -> None:
        checkout.slow.touch()
        process = checkout.start()
        until = time.monotonic() + 30
        while not checkout.installs():
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        (checkout.root / ".venv" / "half-installed").touch()
        checkout.slow.unlink()
        _, said = checkout.ensure()
        assert "half-made" in said
        assert not (checkout.root / ".venv" / "half-installed").exists()

    def test_an_environment_without_a_python_is_made_anew(self, checkout: Checkout) -> None:
        python, _ = checkout.ensure()
        python.unlink()
        assert checkout.ensure()[0].exists()

    def test_where_uv_fails_pip_is_tried(self, checkout: Checkout) -> None:
        checkout.broken.touch()
        python, said = checkout.ensure()
        assert python.exists()
        assert "no such index" in said
        assert "by pip" in said
