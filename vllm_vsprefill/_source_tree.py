# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Makes a source checkout importable without an installation.

In the repository `kernels/` and `indexer_ckpts/` lie beside `vllm_vsprefill/`; installed, they lie inside it (see
`setup.py`). Python started in the repository root imports `vllm_vsprefill` from there even if an ordinary (not
editable) installation exists as well, and would then not find the two. This finder maps exactly these two names, and
only where the folders do lie beside the package.

The reverse also needs care: started in the root, `import kernels` finds the folder here instead of the Hugging Face
library of that name, which transformers imports where it is installed. `hand_over` gives it the library.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
_MAPPED = ("kernels", "indexer_ckpts")


class SourceTreeFinder:
    """Finds `vllm_vsprefill.kernels` and `vllm_vsprefill.indexer_ckpts` beside the package."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of one of the two mapped packages, `None` for every other name."""
        parent, _, name = fullname.rpartition(".")
        if parent != "vllm_vsprefill" or name not in _MAPPED:
            return None
        folder = _PACKAGE.parent / name
        init = folder / "__init__.py"
        if not init.is_file():
            return None
        return spec_from_file_location(fullname, init, submodule_search_locations=[str(folder)])


def install() -> None:
    """Append the finder once per process; does nothing in an ordinary installation."""
    if not (_PACKAGE.parent / "setup.py").is_file():
        return
    if not any(getattr(finder, "__name__", "") == SourceTreeFinder.__name__ for finder in sys.meta_path):
        # First, so that all of it comes from this tree even where another checkout is installed as editable.
        sys.meta_path.insert(0, SourceTreeFinder)


def hand_over(name: str) -> None:
    """Replace a top-level module found in the repository root by the library of that name, if one is installed.

    Called by `kernels/__init__.py` when it is imported as `kernels`. Without such a library it does nothing.
    """
    root = _PACKAGE.parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules[name] = module  # the import statement under way returns what it finds here
    spec.loader.exec_module(module)
