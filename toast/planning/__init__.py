"""`toast plan`: what a run needs on one or many accelerators, told from its configuration alone."""
