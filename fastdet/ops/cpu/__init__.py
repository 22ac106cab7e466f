"""The CPU implementations of the operations, and formulas in plain torch that serve every device."""
