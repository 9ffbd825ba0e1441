"""bhystream(5), read and written."""
