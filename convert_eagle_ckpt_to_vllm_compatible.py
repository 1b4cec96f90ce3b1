"""Step 5: write a trained draft as a folder that stock vLLM loads.

    python convert_eagle_ckpt_to_vllm_compatible.py --base-path ./llama-2-7b-chat --draft-path ./checkpoints \\
        --base-weight-name model.safetensors.index.json --draft-weight-name model.safetensors

The two file names are found by themselves when left out. Inputs are never changed. Exit codes: 0 done, 1 the work
failed, 2 the request is wrong.
"""

import sys

from eagle.entry import run_script

if __name__ == "__main__":
    sys.exit(run_script("eagle.vllm.convert"))
