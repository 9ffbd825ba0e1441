"""What only a host with bhyve can tell."""
