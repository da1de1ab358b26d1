"""The commands of `toast` that have a group of options of their own."""
