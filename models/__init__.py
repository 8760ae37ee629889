"""Score networks, and `score.py`, which turns a network and an SDE into a score."""

from models import cpu_convolutions, cpu_random

cpu_convolutions.register()
cpu_random.register()
