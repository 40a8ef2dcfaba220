"""Files other programs read: one module per format, each with what writes it and what reads it."""
