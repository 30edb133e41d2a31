"""`python -m dit_sparse`."""

from .cli import main

main()
