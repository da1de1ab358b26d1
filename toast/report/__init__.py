"""`toast report`: a run as one page to read and to send: what was trained, what came out, where it looks."""
