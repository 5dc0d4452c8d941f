"""When a job starts, how it runs, and how its version reaches every replica."""
