"""Providers that cost money."""
