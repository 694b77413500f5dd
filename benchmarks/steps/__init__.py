"""Ways of stepping a GAN, a program each; benchmarks/engine.py runs them side by side."""
