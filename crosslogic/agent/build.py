"""Builds the agent into one file that any Python 3.9 runs: `crosslogic-agent.pyz`, the same bytes everywhere."""

from __future__ import annotations

import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

NAME = "crosslogic-agent.pyz"

# Compression depends on the library's version and would make the bytes differ.
_METHOD = zipfile.ZIP_STORED
_AT = (1980, 1, 1, 0, 0, 0)

_MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("The agent needs Python 3.9 or later; this is %s." % sys.version.split()[0])

from crosslogic.agent.agent import main

sys.exit(main())
"""


def build() -> bytes:
    """The zipapp: the agent's modules and NVIDIA's pynvml, behind a first line that finds Python."""
    folder = Path(__file__).parent
    files = {"__main__.py": _MAIN.encode(), "crosslogic/__init__.py": b""}
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("build.py", "__main__.py"):
            files[f"crosslogic/agent/{path.name}"] = path.read_bytes()
    nvml = find_spec("pynvml")
    if nvml is not None and nvml.origin is not None:
        files["pynvml.py"] = Path(nvml.origin).read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", _METHOD) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _AT), content)
    return b"#!/usr/bin/env python3\n" + buffer.getvalue()
