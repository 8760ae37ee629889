"""Commands that measure this code; each prints a table, and writes JSON on request."""

import start

start.prepare()
