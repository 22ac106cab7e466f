"""`python -m fastdet` is `fastdet`."""

import sys

from fastdet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
