"""Settings of the process that runs the tests."""

import os

# Before torch is imported. Calls as small as those of the tests are slower in several threads, and
# two processes run tests; where threads matter, a test sets their number.
os.environ["OMP_NUM_THREADS"] = "1"
# As the command line does: threads that spin while they wait starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
