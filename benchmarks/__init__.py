"""What graft is measured by: each module is a program of its own, `python -m benchmarks.NAME`; `make bench` runs them all."""
