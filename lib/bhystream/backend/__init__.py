"""The backends: how a guest of each hypervisor is read, paused, started and ended."""
