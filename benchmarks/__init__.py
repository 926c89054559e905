"""Benchmarks of the library and of similar libraries; run them from the root of the repository."""
