"""The gates, which need no GPU: every configuration compiled, every plan launched into a stub driver."""
