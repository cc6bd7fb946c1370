"""Synthetic tasks that a memory is for: documents from a seed, and questions about them.

`batch` has what they share, `records` and `needles` make the documents.
"""
