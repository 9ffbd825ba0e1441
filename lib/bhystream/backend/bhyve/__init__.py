"""bhyve on FreeBSD, and its stand-in: a guest named by its name."""
