"""`python -m cluster` is `graft`."""

import sys

from cluster.cli import main

sys.exit(main())
