"""The offline search for head patterns; `mmcompile.search` is its entry."""
