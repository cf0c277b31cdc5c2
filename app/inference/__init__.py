"""OpenAI-shaped inference: models, completions, chat completions, streamed or whole."""
