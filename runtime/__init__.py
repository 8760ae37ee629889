"""What surrounds a run: several processes, errors told in one line, settings before JAX starts.

Imports nothing of this project.
"""
