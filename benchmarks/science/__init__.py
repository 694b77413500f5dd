"""Published results, reproduced: each module is a program of its own, `python -m benchmarks.science.NAME`."""
