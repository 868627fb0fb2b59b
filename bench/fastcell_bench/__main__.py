"""`python -m fastcell_bench`: the same as `fastcell bench`."""

import sys

from fastcell_bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
