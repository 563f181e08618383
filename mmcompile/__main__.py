"""`python -m mmcompile`."""

from mmcompile.cli import main

if __name__ == "__main__":
    main()
