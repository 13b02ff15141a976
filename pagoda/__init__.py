"""Pagoda: the whole AI computing stack, from the chip to the chat, in one Python package.

Importing this module loads nothing else: each storey is a folder of its own and is imported by
whoever needs it (`docs/reading.md` lists them from the ground up).
"""

__version__ = "0.1.0"
