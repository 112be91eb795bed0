"""The entry of `python -m crosslogic.dev.stripe_double`."""

from __future__ import annotations

from crosslogic.dev.stripe_double.server import main

if __name__ == "__main__":
    main()
