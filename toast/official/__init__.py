"""Checkpoints of the official implementation: loaded into plain models, or converted into adapters."""
