"""What can be asked for: fields and their defaults, ranges, released and own configs.

Imports `runtime`.
"""
