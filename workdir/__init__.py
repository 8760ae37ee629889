"""What a run leaves behind: files, page, reports, rounds, progress; which fields may change.

Imports `configs` and `runtime`; knows nothing of networks and data.
"""
