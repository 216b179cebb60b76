"""Paid AI providers, and providers that the operator supplies."""
