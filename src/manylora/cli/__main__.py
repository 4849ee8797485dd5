"""`python -m manylora.cli` is the `manylora` command."""

import sys

from manylora.cli import main

sys.exit(main())
