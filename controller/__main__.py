"""``python -m controller`` is ``drctl``."""

from controller.cli.main import main

if __name__ == "__main__":
    main()
