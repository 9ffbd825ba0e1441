"""What the composition of the handshake's tables can do, searched."""
