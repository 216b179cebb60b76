"""HTTP requests to other servers."""
