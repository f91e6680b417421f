"""`python -m diffmic_fast`: the same commands as `diffmic-fast`."""

import sys

from diffmic_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
