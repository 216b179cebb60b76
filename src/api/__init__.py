"""The entry points: HTTP, Socket.IO, the command line and the page; wiring, service and ASGI application."""
