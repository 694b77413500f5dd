"""Scores that can be trusted: distances, copying, verdicts, feature nets and the contract between them."""
