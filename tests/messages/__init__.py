"""Table of messages, one module a family; `test_messages.py` runs every row of `ROWS` of each."""
