"""Floor 1: attacks as functions of an objective, one per file; torch only.

Nothing is re-exported: a function `pgd` here would hide the module `mi_at.attacks.pgd`.
"""
