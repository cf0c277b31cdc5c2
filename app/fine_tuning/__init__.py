"""Fine-tuning jobs, in OpenAI's shapes."""
