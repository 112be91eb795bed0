"""What runs beside an engine on a node. Standard library only, Python 3.9 or later: a node has nothing else of ours."""

from __future__ import annotations

VERSION = "1"
