"""Benchmarks: what layers, links between workers, and training steps cost on a cluster."""
