"""Full fine-tuning of all networks from weights that Reptile meta-learned (FIGR, Clouatre and Demers 2019)."""

from training.methods.method import Method

METHOD = Method(start="meta", rule="reptile")
