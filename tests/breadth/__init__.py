"""How far it reaches: a block of every architecture that transformers and timm build offline, off and checked.

``python -m breadth`` (with ``tests`` on the path; ``make breadth``) runs everything and writes docs/breadth.md.
"""
