"""Make torchvision importable beside a torch build that its compiled operators do not fit.

A CPU-only torch with the default (CUDA) torchvision wheel cannot load torchvision's compiled operators, and its import
then fails, because it attaches shape functions to operators that are not there. Everything in pure Python (transforms,
model helpers, all that timm uses) works once those operators are declared. Where, and only where, the import fails in
this way, this script adds a start-up hook to the virtual environment that declares them before torchvision is
imported. No file of another package is changed.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares the operators that torchvision expects from its compiled part, before it is imported."""

import sys


class _Declare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(_Declare)
            import torch

            _Declare.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _Declare.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Declare)
'''


def main() -> None:
    """Try the import; add the hook if it fails for the known reason; complain if it still fails."""
    if "does not exist" not in import_error():
        return
    site = Path(sysconfig.get_path("purelib"))
    (site / "_torchvision_ops.py").write_text(HOOK)
    (site / "_torchvision_ops.pth").write_text("import _torchvision_ops\n")
    if error := import_error():
        sys.exit(f"torchvision cannot be imported:\n{error}")
    print("torchvision: the compiled operators do not fit this torch; its Python part works")


def import_error() -> str:
    """What importing torchvision prints when it fails; nothing when it works or is not installed."""
    found = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 or "No module named 'torchvision'" in found.stderr else found.stderr


if __name__ == "__main__":
    main()
