"""bhyrecv(8), where no installed script is at hand: python -m bhystream.recv."""

import sys

from bhystream.recv.main import main

if __name__ == "__main__":
    sys.exit(main())
