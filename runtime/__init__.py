"""What surrounds a run: devices, processes, errors in one line, settings before JAX starts.

Imports nothing of this project.
"""
