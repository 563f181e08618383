"""How the kept model was made: `python -m mmcompile.needle.training`."""
