"""What a run needs before it is started: bytes by part, traffic, FLOPs, and what to change if it does not fit."""
