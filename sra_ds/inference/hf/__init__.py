"""A run as a folder for `transformers`: `export` writes it; the model files go with it.

Those stand alone: torch and transformers are all they need, and nothing here imports them.
"""
