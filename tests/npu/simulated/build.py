"""Builds the extension, in a process of its own since torch loads what it builds.

python -m tests.npu.simulated.build FOLDER
"""

import sys

from torch.utils import cpp_extension

from tests.npu.simulated import HERE

if __name__ == "__main__":
    cpp_extension.load(
        "simulated_npu",
        [str(source) for source in sorted((HERE / "source").glob("*.cpp"))],
        build_directory=sys.argv[1],
        extra_cflags=["-O0", "-g0", "-w"],
        is_python_module=False,
    )
