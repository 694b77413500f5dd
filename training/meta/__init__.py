"""Meta-learning over the source's classes as tasks."""
