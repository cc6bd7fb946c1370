"""`memorizing benchmark`: how fast things are here, and what a memory of a model is used for."""
