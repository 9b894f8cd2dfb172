"""Call a hook of the build backend with the torch that is here passing for one with CUDA.

`python cuda_torch.py VERSION_OF_CUDA FOLDER HOOK`, in the folder of setup.py. FOLDER holds a piece
of a CUDA wheel: `torch/utils/cpp_extension.py` and `torch/version.py`, which take the place of the
installed ones, `torch/include`, and in `torch/lib` what is linked. With "-" the installed torch's
serve. So setup.py does all that it does beside the CUDA wheel itself, which would not import
without some gigabytes of CUDA libraries.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

cuda, folder, hook = sys.argv[1:]
if folder != "-":
    wheel = Path(folder, "torch")
    torch.utils.__path__.insert(0, str(wheel / "utils"))
    version = runpy.run_path(str(wheel / "version.py"))["__version__"]
    torch.__version__ = torch.version.__version__ = TorchVersion(version)
torch.version.cuda = cuda
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False

from setuptools import build_meta  # noqa: E402 - reads nothing of torch, but what it runs does

print(eval(hook, vars(build_meta)))
