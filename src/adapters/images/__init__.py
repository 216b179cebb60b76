"""Image storage, validation, decoding and composition."""
