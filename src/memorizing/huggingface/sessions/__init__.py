"""A memory that is open: what is read, kept, looked up and scored."""
