"""Studies: a sweep on several tasks and along a curve, its figures as lines, and tables made from them."""
