"""``python -m fastdg`` is ``fastdg``."""

from .cli import main

main()
