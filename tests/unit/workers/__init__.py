"""The queue's processes: real ones, on a real Valkey."""
