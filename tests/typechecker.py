"""What checks annotations in tests: beartype, to which a whole number is a float too (PEP 484)."""

from beartype import beartype, BeartypeConf

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
