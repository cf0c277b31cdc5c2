"""The algebra of versions: diff, flatten, revert from the middle, replay onto another base."""
