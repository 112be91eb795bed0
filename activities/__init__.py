"""Effects on the world, one class per kind; clients are held, not imported."""
