"""The demo model: its network, its training, and the checkpoint itself."""
