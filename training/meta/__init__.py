"""Meta-learning over the source's classes as tasks; rules by name: a file and a line each."""

from __future__ import annotations

from training.meta import fomaml, maml, reptile
from training.meta.rule import Inner, Rule

__all__ = ["RULES", "Inner", "Rule"]

RULES: dict[str, Rule] = {"reptile": reptile.RULE, "fomaml": fomaml.RULE, "maml": maml.RULE}
