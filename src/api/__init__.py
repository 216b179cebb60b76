"""The doors: HTTP, Socket.IO, the command line, and the composition root."""
