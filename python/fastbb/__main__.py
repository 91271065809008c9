# SPDX-License-Identifier: Apache-2.0
"""`python -m fastbb` is the command `fastbb`."""

import sys

from fastbb.cli import main

if __name__ == "__main__":
    sys.exit(main())
