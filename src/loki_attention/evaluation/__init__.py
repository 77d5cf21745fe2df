"""What a method loses: perplexity, retrieval and fidelity to dense attention."""
