"""What is searched and how: spaces, distributions, searchers, rungs."""
