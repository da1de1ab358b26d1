"""Generation: two key-value caches, one a pass."""
