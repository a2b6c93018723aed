"""What ``python -m seqkernels demo`` runs: a small ranker on real data, before and after `swap`."""
