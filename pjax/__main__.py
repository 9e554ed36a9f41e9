"""`python -m pjax`."""

from pjax.cli import entry

entry()
