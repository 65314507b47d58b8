"""What the commands of `janusflow.cli` do, a module each with `run(arguments)`.

`run` raises a `JanusFlowError` or `OSError` for a user's mistake, before anything is written.
"""
