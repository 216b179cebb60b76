"""The handlers of the Socket.IO events."""
