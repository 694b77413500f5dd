"""Full fine-tuning of all networks from weights that first-order MAML meta-learned (Finn, Abbeel and Levine 2017)."""

from training.methods.method import Method

METHOD = Method(start="meta", rule="fomaml")
