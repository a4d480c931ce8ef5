"""``python -m real_fast COMMAND ...`` is ``real-fast COMMAND ...``."""

import sys

from real_fast.commands import main

if __name__ == "__main__":
    sys.exit(main())
