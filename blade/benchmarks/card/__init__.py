"""Benchmark of one card in a given time, best first."""
