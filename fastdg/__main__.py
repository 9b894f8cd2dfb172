"""``python -m fastdg`` is ``fastdg``."""

from .cli import main

if __name__ == "__main__":  # the demo's processes import this file
    main()
