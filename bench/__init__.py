"""What the gateway costs, measured beside its peers: `python -m bench.gateways`. The protocol is in README.md."""
