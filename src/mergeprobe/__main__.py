"""`python -m mergeprobe` is the command `mergeprobe`."""

import sys

from mergeprobe.cli import main

sys.exit(main())
