"""Several processes: all-reduce of the active block only."""
