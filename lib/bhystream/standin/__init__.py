"""A bhyve work-alike for machines that have no bhyve."""
