"""The foundation every room stands on: decisions, contracts, storage and clients."""
