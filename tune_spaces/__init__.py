"""What to try where: target domains, methods, search spaces, rungs and seeds. Declares; `cluster` acts."""
