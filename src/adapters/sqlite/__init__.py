"""The storage in a file, for one server."""
