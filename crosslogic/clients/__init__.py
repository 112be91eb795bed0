"""Clients of the outside world: clouds, engines, Temporal."""
