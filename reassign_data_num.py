"""Step 3b: reshard a store, or a folder of classic dumps, into TP folders of about equal tokens.

    python reassign_data_num.py --old_folder ./features --new_folder ./features_tp8 --tp 8

Both folders may be the same. An interrupted run loses nothing; the same command finishes it. Exit codes: 0 done,
1 the work failed, 2 the request is wrong.
"""

import sys

from eagle.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("eagle.store.reshard"))
