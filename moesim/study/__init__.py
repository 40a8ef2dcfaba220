"""Many scenarios: spaces, sweeps and scaling."""
