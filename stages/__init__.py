"""The stages of the pipeline: each file is one, `python -m stages.<name>`, as dvc.yaml has it.

What torch is to do on the CPU it reads from the environment, once, when it is imported; what stands
there already is left. A thread of OpenMP that has nothing to do sleeps: by default it spins for a
while, and beside another busy process that makes a training up to ten times slower. Memory comes in
huge pages, where the system has some (Linux): a batch is then made with a tenth of the page faults.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
