"""bhysend(8), where no installed script is at hand: python -m bhystream.send."""

import sys

from bhystream.send.main import main

if __name__ == "__main__":
    sys.exit(main())
