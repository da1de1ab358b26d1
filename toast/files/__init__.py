"""Files that are written whole or not at all, and read whole or refused."""
