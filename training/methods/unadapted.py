"""The source's generator as it is: what a domain scores without any adaptation, so that a gain can be told from what the start
alone was worth."""

from training.methods.method import Method

METHOD = Method(start="pretrain", phases=lambda adaptation: [], hyperparameters=(), judged=False)
