"""The CPU implementations of the operations."""
