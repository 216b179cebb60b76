"""Images: stored, decoded, composed."""
