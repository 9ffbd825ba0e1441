"""Hypervisors: how each reads, pauses, starts and ends a guest."""
