"""The statements: one module per table, each SQL constant right above the one function that runs it.

Functions take a connection and never begin a transaction; the use case in `services` opens exactly one.
"""
