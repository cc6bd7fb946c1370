"""Does a model say, and use, what it has read? A memory and its rivals at the same prompts."""
