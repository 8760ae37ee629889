"""Commands that measure this code; each prints a table, and writes JSON on request."""

from runtime import start

start.prepare()
