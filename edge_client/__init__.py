"""The client: takes a task, trains on local text, sends a coded update. Read `participate.py` first."""
