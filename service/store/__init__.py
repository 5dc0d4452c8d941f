"""The edit store: every fact that must survive, in PostgreSQL. The only SQL in the project.

One module per aggregate; each function takes the connection of the caller's transaction first.
"""
