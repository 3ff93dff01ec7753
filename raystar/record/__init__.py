"""What a sweep knows and keeps: statuses, events, the summary, files."""
