"""Linked into the build folder: PYTHONPATH=<build>/python means the libqat of that build.

Also where an editable libqat is installed, whose import hook would come before PYTHONPATH.
"""

import sys

sys.meta_path[:] = [f for f in sys.meta_path if "libqat" not in getattr(f, "known_source_files", ())]
