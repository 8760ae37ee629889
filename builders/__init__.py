"""From a config to the parts of a run: the only rooms above are `run_lib` and `main`.

Imports all rooms; only here a config is read.
"""
