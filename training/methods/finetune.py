"""Full fine-tuning of G and D from the source's weights (TransferGAN, Wang et al. 2018)."""

from training.methods.method import Method, train_everything

METHOD = Method(start="pretrain", prepare=train_everything)
