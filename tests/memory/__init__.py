"""The loops, holes, and XXH3."""
