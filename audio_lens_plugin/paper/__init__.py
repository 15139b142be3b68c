"""The AudioLens paper for any model: what a run computes (`design`, `experiments`), its folder (`folder`), who does the
work (`run`), and what is made of it (`tables`, `findings`, `figures`, `sections`, `finish`, `compare`).
"""
