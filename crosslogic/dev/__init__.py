"""What only a development machine needs: the embedded stack, the local cloud and demo seeds."""
