"""These tests want Triton's interpreter, which is chosen when Triton is imported.

So they run in processes of their own (`tests/triton/test_interpreted.py`), or by hand::

    TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
