"""The control: fresh weights, the same budget. Every gain is measured against it."""

from training.methods.method import Method, train_everything

METHOD = Method(start="scratch", prepare=train_everything)
