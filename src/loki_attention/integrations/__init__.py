"""Other people's software, and nothing else."""
