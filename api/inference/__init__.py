"""The hot path: a pure-ASGI handler for `/v1`. It never waits for Temporal, and on a warm cache never for SQL."""
