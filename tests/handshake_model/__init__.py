"""A search of everything that the handshake's tables can do together."""
