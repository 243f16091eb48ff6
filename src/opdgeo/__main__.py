"""``python -m opdgeo``."""

from opdgeo.cli import main

main()
