"""The storage in this process's memory."""
