"""`python -m fa_reference ...`: what every target of the Makefile calls."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (said in words, to a Python that pip never saw)
    sys.exit("This course needs Python 3.11 or newer; this is Python {}.{}.".format(*sys.version_info[:2]))

from fa_reference.cli import main  # noqa: E402  (after the version is known to do)

if __name__ == "__main__":
    sys.exit(main())
