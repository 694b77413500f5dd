"""Loaders of several projects over the same images, each run in an environment and in processes of its own."""
