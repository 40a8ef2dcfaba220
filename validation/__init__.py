"""Comparisons of moesim with what was measured and published."""
