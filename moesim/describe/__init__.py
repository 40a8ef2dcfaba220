"""Text becomes a checked description here, once: documents, scenarios, hardware."""
