"""bhysend(8), piece by piece."""
