"""Benchmarks: ``python -m bench.run --op row_softmax``; not part of the installed package."""
