"""Conversations in, the same prompts with the base model's own replies out: what a draft is best trained on.

    python tools/regenerate.py --server http://localhost:8000/v1 --model_name ./llama-2-7b-chat \\
        --data_path ./sharegpt.json --output ./own.jsonl

Asks OpenAI-compatible servers; without --server it starts vLLM where that is installed, else decodes by itself. The
same command goes on with an interrupted run. Step 3 reads the output as it is. Exit codes: 0 done, 1 the work failed,
2 the request is wrong.
"""

import sys
from pathlib import Path

# A script in tools/ does not have the repository root on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eagle.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("eagle.regenerate.main"))
