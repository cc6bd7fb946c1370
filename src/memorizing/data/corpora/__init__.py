"""The corpora: one loader per kind of text, and the kinds by name."""
