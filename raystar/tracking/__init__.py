"""Where runs, metrics and pictures are recorded: a protocol, and what stands between it and a store."""
