"""Layers that model families are made of; they know nothing of files or requests."""
