"""Giving a model of `transformers` a memory: its family, hooks, and what surrounds each call."""
