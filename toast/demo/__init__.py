"""`toast demo`: the method on what the package holds, as runs of the training program."""
