"""The stages of the pipeline: each file is one, `python -m stages.<name>`, as dvc.yaml has it.

A thread of OpenMP that has nothing to do sleeps here, unless the environment says otherwise. By
default it spins for a while, and beside another busy process that makes a training on the CPU up to
ten times slower. OpenMP reads this once, when torch is imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
