"""Score networks, and `score.py`, which turns a network and an SDE into a score."""
