"""bhysend(8) as `python -m bhystream.send`, for use without the installed script."""

import sys

from bhystream.send.main import main

if __name__ == "__main__":
    sys.exit(main())
