"""Data sets that a run trains on and is measured on."""
