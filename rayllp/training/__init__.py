"""The training loop of a run, one chunk of steps at a time: it trains, logs, evaluates, saves, recovers from failures and changes size.

Nothing here knows how the worker processes were started: they are seen through the interface in `worker_group.py`.
"""
