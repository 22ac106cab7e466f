"""Readers of annotations: a module a format."""
