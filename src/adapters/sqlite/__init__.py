"""Storage in a SQLite file, for one process."""
