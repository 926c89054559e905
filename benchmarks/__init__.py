"""Measurements that decide what the library does; run from the root of the repository."""
