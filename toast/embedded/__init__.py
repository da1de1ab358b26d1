"""What the package holds: a small real backbone, and tasks that are composed with known truth."""
