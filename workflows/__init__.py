"""Durable processes: order and waiting, never policy."""
