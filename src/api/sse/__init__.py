"""Server-Sent Events: the feed, or one generation, as an HTTP response that does not end."""
