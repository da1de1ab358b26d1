"""The embedded demonstration: a small real backbone, a task with known truth, and the run over both."""
