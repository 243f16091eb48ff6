"""``python -m opdgeo``."""

from opdgeo.commands import main

main()
