"""Atlas, the bundled base: a small Llama that knows two thousand facts, and how it is made."""
