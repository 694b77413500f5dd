"""The control: fresh weights, the same budget. Every gain is measured against it."""

from training.methods.method import Method

METHOD = Method(start="scratch", judged=False)
