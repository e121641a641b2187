"""How much each layer of a model matters: leave-one-out, block influence, divergence, and a greedy search.

``sweep`` goes through the layers, ``measure`` evaluates, ``log`` writes and resumes, ``report`` and ``plot`` show,
``job`` runs many sweeps from a file.
"""

from neutralize.influence.log import Log
from neutralize.influence.sweep import Influence, Progress, Step, Sweep, influence

__all__ = ["Influence", "Log", "Progress", "Step", "Sweep", "influence"]
