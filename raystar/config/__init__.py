"""Every configuration key, and how files, overlays and assignments become a `Config`."""
