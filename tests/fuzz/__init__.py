"""A fuzz of our own: bad folders, command lines, bundles and prompts, and what may come of them.

`make fuzz`, or `python -m tests.fuzz --help`. A case follows from the seed and its number alone.
"""
