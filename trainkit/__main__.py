"""`python -m trainkit`: the same as the command `trainkit`."""

import sys

from trainkit.cli import main

sys.exit(main())
