"""``python -m kvsuite`` is ``kvsuite``."""

import sys

from kvsuite.cli import main

sys.exit(main())
