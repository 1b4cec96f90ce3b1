"""``python -m eagle.evaluate``: see `eagle.decode.evaluate`."""

import sys

from eagle.decode.evaluate import main
from eagle.entry import run

if __name__ == "__main__":
    sys.exit(run(main))
