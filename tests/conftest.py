"""Settings of the process that runs the tests."""

import os

# As the command line does, before torch is imported: threads that spin starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
