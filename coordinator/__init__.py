"""The coordinator: takes updates in, combines them, publishes releases. All its state is in the store.

Read `service.py` for what comes in, `rounds.py` for what is decided, `closing.py` for how a round becomes a release.
"""
