"""How a call of a wrapped model is caught and run: what stands in for methods and blocks, and hooks."""
