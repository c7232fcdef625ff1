"""Benchmarks of the packages against what else there is, and their results. Nothing imports them, nothing installs them."""
