"""Needle in a haystack: facts hidden in long videos and text, asked for at the end of the prompt."""
