"""Source files that an exported folder carries with it; see `sra_ds.inference.hf_export`.

They stand alone: torch and transformers are all they need, and nothing here imports them.
"""
