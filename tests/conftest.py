"""Tests run side by side: more threads than cores would only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
