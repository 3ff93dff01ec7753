"""What everything stands on: errors, files, the console. Imports nothing of raystar."""
