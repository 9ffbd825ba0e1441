"""bhyrecv(8) without an installed script: python -m bhystream.recv."""

import sys

from bhystream.start import run

if __name__ == "__main__":
    sys.exit(run("bhyrecv", "recv"))
