"""The margin models of venues: one module each, the table of them in `registry`."""
