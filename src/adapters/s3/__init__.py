"""Image storage in a bucket of S3 or a compatible service, for any number of nodes."""
