"""What TOAST costs, against the plain model, peers, and the method as a textbook would write it."""
