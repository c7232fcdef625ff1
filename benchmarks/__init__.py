"""Benchmarks of the packages against their peers, and the results. Neither imported nor installed by anything."""
