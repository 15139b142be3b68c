"""The runtime type checker of the tests: beartype, with an int being a float as in Python's own type system."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
