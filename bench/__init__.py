"""Benchmarks, each beside its limit or its peers in the same run."""
