"""The engine beside its peers: same process, same weights, same prompts, runs interleaved."""
