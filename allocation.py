"""Step 3: run the frozen base model over conversations and store its features, one worker per card group.

    python allocation.py --outdir ./features --end_num 100 --npu_indices "0,1,2,3,4,5,6,7" --used_npus 8 \\
        --model_type llama --model_name ./llama-7B --data_path ./sharegpt.json --seed 42 --max_length 2048 \\
        --dtype bfloat16

Worker i writes ``OUTDIR/<i>/``. The same command continues an interrupted job. Exit codes: 0 done, 1 the work
failed, 2 the request is wrong.
"""

import sys

from eagle.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("eagle.generate.main"))
