"""The compiled extension `tlalign_kernels._C`, or the reason why it is missing (the package works without it)."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings

VERSION = importlib.metadata.version("tlalign-kernels")

try:
    compiled = importlib.import_module("tlalign_kernels._C")
except ImportError as error:
    compiled = None
    missing_reason = (
        f"the compiled extension is missing ({error}); to build it, install a C++ compiler and Python's headers and "
        "reinstall"
    )
else:
    missing_reason = None
    built = compiled.build_info()["version"]
    if built != VERSION:
        compiled = None
        missing_reason = (
            f"the compiled extension is of version {built}, the package of {VERSION}; reinstall to rebuild it"
        )

if missing_reason is not None:
    warnings.warn(f"tlalign-kernels: {missing_reason}", RuntimeWarning, stacklevel=2)
