"""Families of models as rows of data, and the parts of a live model that a row names."""
