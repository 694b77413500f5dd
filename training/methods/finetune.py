"""Full fine-tuning of G and D from the source's weights (TransferGAN, Wang et al. 2018)."""

from training.methods.method import Method

METHOD = Method(start="pretrain")
