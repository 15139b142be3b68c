"""One room per model family: the model as a hooked graph, its prompt, its audio spans.

A file here that defines `FAMILY` is found by itself; nothing else has to be edited (see `audio_lens_plugin.patch`).
"""
