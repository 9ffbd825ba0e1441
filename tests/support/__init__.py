"""What helps the tests, and is none."""
