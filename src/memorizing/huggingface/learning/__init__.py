"""What is learned beside a model with memory: which heads read, and adapters."""
