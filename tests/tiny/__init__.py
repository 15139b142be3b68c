"""Tiny models with random weights, one module per family that has no toy: ``build()`` gives module and processor."""
