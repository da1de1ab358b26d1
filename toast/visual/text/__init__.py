"""Where a steered language model looks, over text."""
