"""The entry of `python crosslogic-agent.pyz` and `python -m crosslogic.agent`."""

from __future__ import annotations

import sys

from crosslogic.agent.agent import main

if __name__ == "__main__":
    sys.exit(main())
