"""bhyrecv(8), piece by piece."""
