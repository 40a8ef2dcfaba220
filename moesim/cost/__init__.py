"""Operators plus hardware to seconds: the only place beside the engines where seconds appear."""
