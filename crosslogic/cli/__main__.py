"""The entry of `python -m crosslogic.cli`."""

from __future__ import annotations

from crosslogic.cli.commands import main

if __name__ == "__main__":
    main()
