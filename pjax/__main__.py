"""`python -m pjax`."""

import sys

from pjax.cli import main

sys.exit(main())
