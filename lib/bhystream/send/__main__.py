"""bhysend(8) as `python -m bhystream.send`, for use without the installed script."""

import sys

from bhystream.start import run

if __name__ == "__main__":
    sys.exit(run("bhysend", "send"))
