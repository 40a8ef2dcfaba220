"""Files that other programs write or read: measured records, logs, traces; one module per format."""
