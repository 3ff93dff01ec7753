"""A sweep from the request to its last line."""
