"""primerisk: margin and risk for AI trading agents."""
