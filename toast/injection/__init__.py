"""How an adapter gets into a model: what is refused, what is filled in, and what other libraries load."""
