"""Measurements, one command each; what they said stands in docs/log.md."""
