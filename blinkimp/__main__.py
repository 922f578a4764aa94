"""`python -m blinkimp`: the same as the `blinkimp` command. Test: pytest tests/host/test_cli.py"""

import sys

from blinkimp.cli import main

sys.exit(main())
