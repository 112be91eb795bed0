"""All Redis: fast, shared, and rebuildable from Postgres at any time."""
