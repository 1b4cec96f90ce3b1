"""Step 2 (optional): conversations in other formats -> ShareGPT.

    python tools/sharegpt_convert.py --input alpaca.json chats.jsonl qa.csv --output sharegpt.json

Reads alpaca, openai (messages), prompt/response pairs, ultrachat and sharegpt variants from JSON, JSON Lines,
Parquet, CSV and TSV; each file's format is recognised by itself. Exit codes: 0 done, 1 nothing could be converted or
the disk is full, 2 the request is wrong.
"""

import sys
from pathlib import Path

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("eagle.data.sharegpt.main", needs_torch=False))
