"""What a saved adapter holds."""
