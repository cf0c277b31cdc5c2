"""What every process tells of itself: logs, traces, and which request or job they belong to.

It imports nothing of the other rooms, which may all use it. No torch.
"""
