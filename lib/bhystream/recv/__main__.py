"""bhyrecv(8) without an installed script: python -m bhystream.recv."""

import sys

from bhystream.recv.main import main

if __name__ == "__main__":
    sys.exit(main())
