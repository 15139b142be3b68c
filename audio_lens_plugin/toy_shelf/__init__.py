"""The toy shelf: models of a real architecture at toy size, their clips, and the program that made them.

A toy lets the whole library run on a laptop without a network: in tests, in examples and in the first five minutes of a
new user. It is a real checkpoint of a real architecture, trained on synthetic clips for the four SAKURA tracks; what it
is not is a speech model. Each toy lies in a folder of its own (``qwen2-audio/``), with a model card and a few clips.
"""
