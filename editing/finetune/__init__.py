"""Fine-tuning: what is trained becomes a delta, as an edit does."""
