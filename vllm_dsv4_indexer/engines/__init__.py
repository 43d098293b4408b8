"""One file per engine: where our compressor gets into it, and nothing else."""
