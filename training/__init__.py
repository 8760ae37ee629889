"""How parameters are found: steps, the loop, optimisers, checkpoints; classifiers and energies.

Imports all rooms but `evaluation` and `builders`.
"""
